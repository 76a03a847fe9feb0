"""The site builds without a warning, its quick commands run, and what it says of the code is so."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCKS = [
    pytest.param(text, id=f"{page.relative_to(ROOT / 'docs')}-{number}")
    for page in PAGES
    for number, (kind, text) in enumerate(re.findall(r"```bash([^\n]*)\n(.*?)```", page.read_text(), re.DOTALL))
    if not kind.strip()
]
PACKAGES = ("cluster", "rollout_actors", "reward_service", "learner", "deploy")
OTHERS = ("should be", "out of memory")
"""Parts of messages that libraries write."""


def run(*command: str) -> None:
    environment = {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@cache
def messages() -> tuple[str, ...]:
    """Every text in the source of the packages."""
    trees = [ast.parse(path.read_text()) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return tuple(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.process
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    run("mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site"))
    assert (tmp_path / "site" / "reference" / "run-file" / "index.html").exists()


@pytest.mark.process
@pytest.mark.parametrize("text", BLOCKS)
def test_a_quick_command_of_the_docs_runs(text: str) -> None:
    run("bash", "-euo", "pipefail", "-c", text)


def test_the_tutorial_shows_the_files_of_the_tested_page() -> None:
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    tested = (ROOT / "examples" / "README.md").read_text().partition("## Your own task")[2].partition("\n## ")[0]
    blocks = re.compile(r"```(?:python|toml)\n.*?```", re.DOTALL)
    assert blocks.findall(tutorial) == blocks.findall(tested)


def test_every_message_in_troubleshooting_is_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    heads = re.findall(r"^#### (.*)$|^\| (`.*?`) \|", page, re.MULTILINE)
    shown = [code for head in heads for code in re.findall(r"`([^`]+)`", "".join(head))]
    parts = [part.strip() for message in shown for part in re.split(r"…", message)]
    wanted = [part for part in parts if len(part) > 3 and part not in OTHERS]
    assert [part for part in wanted if not any(part in text for text in messages())] == []


def test_every_setting_with_a_name_elsewhere_is_one_of_the_run_file() -> None:
    from deploy.config.peer_names import PEER_NAMES
    from deploy.config.schema import RunConfig

    for key in PEER_NAMES:
        section = RunConfig
        for part in key.split("."):
            assert part in section.model_fields, key
            section = section.model_fields[part].annotation  # type: ignore[assignment]


def test_every_file_named_in_the_architecture_page_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"\b(?:cluster|rollout_actors|reward_service|learner|deploy)/[a-z_/]+(?:\.py)?", page)
    assert [path for path in dict.fromkeys(named) if not (ROOT / path).exists()] == []
