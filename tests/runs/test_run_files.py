"""Every run file that ships loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.config.load import load_run_config
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/*/*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_run_file_loads(path: Path) -> None:
    name = path.parent.name if path.stem == "run" else f"{path.parent.name}-{path.stem}"
    assert load_run_config(path).run.name == name
