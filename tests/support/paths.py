"""Folders of the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
LETTERS = "tests/support/letters.toml"
"""The run file of the letters task, relative to ROOT."""
