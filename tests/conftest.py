"""Fixtures that several packages share: one Ray for the whole session, and small models made from a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
NOT_FAST = ("ray", "process", "slow", "chaos")
settings.register_profile("antiphon", deadline=None)
settings.load_profile("antiphon")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--readme-slow", action="store_true", help="also run the README's slow commands")
    parser.addoption("--fast", action="store_true", help="run only tests without Ray, other processes or a browser")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Group tests by process, order them longest first and, if asked for, keep only the fast ones.

    Tests of a file share a process; so do a package's tests that share a Ray.
    """
    items.sort(key=_order)
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
            group = f"ray-{item.path.relative_to(TESTS).parts[0]}"
        else:
            group = str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    if config.getoption("--fast"):
        slow = [item for item in items if any(item.get_closest_marker(name) for name in NOT_FAST)]
        items[:] = [item for item in items if item not in set(slow)]
        config.hook.pytest_deselected(items=slow)


def _order(item: pytest.Item) -> int:
    """Whole runs first, then tests that share a Ray, then the rest: short tests fill the gaps at the end."""
    if item.path.is_relative_to(TESTS / "runs"):
        return 0
    return 1 if "ray_session" in getattr(item, "fixturenames", ()) else 2


@pytest.fixture(autouse=True, scope="session")
def no_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --fast, fail a test that starts a process: it lacks the marker `process` or `ray`."""
    if not request.config.getoption("--fast"):
        yield
        return

    def refuse(_: Any, command: Any, *__: Any, **___: Any) -> None:
        raise AssertionError(f"{command} starts a process: mark the test with pytest.mark.process")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subprocess.Popen.__init__", refuse)
        yield


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray, started when the first test needs it."""
    import ray

    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=256 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def reward_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model over single characters, with a context of 64 tokens; weights from a seed."""
    from benchmarks.parts.character_model import make_reward_model

    folder = tmp_path_factory.mktemp("reward") / "reward_model"
    return make_reward_model(folder, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, max_tokens=64)
