"""Fixtures that several packages share: one Ray for the whole session, and small models made from a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

RUNS = Path(__file__).parent / "runs"
settings.register_profile("antiphon", deadline=None)
settings.load_profile("antiphon")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--readme-slow", action="store_true", help="also run the README's slow commands")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several processes the tests of a file stay together, and so do all that share the one Ray.

    Whole commands and runs, the longest, come first.
    """
    items.sort(key=lambda item: item.path.parent != RUNS)
    for item in items:
        shares_ray = "ray_session" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if shares_ray else str(item.path)))


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
