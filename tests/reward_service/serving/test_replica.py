from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.errors import InputError, RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.backend import UnknownScorer
from reward_service.client.outcomes import all_scores
from reward_service.config.service import REWARD_MODEL, RewardServiceConfig
from reward_service.serving import replica
from reward_service.serving.replica import RewardService
from reward_service.serving.versions import ModelVersions, published
from tests.support.building import moved_model

ITEM = ScoreRequest("x", "p", "a")


class Numbered:
    """A scorer that returns its version's number after it is released."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.version, self.number = name, f"{name}@{number}", number
        self.started, self.release, self.is_closed = asyncio.Event(), asyncio.Event(), False
        self.release.set()

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        self.started.set()
        await self.release.wait()
        assert not self.is_closed
        return [Score(request.id, float(self.number), {}, self.version) for request in requests]

    def close(self) -> None:
        self.is_closed = True


def service_of(*scorers: Numbered) -> RewardService:
    service = RewardService(RewardServiceConfig(scorer=scorers[0].name))
    service.take({scorer.name: scorer for scorer in scorers})
    return service


async def reward(service: RewardService, scorer: str | None = None) -> float:
    return all_scores(await service.outcomes([ITEM], scorer))[0].reward


async def test_scorers_are_listed_with_the_default_first() -> None:
    service = service_of(Numbered("b", 1), Numbered("a", 2), Numbered("c", 3))
    assert [await reward(service, name) for name in (None, "a", "c")] == [1.0, 2.0, 3.0]
    assert [(info.name, info.is_default) for info in await service.models()] == [
        ("b", True),
        ("a", False),
        ("c", False),
    ]
    with pytest.raises(UnknownScorer, match="no scorer 'd'; this service has b, a, c"):
        await reward(service, "d")
    assert await service.num_scored() == 3


async def test_only_the_previous_version_can_still_be_requested() -> None:
    service = service_of(Numbered("a", 1))
    service.take({"a": Numbered("a", 2)})
    assert [await reward(service, wanted) for wanted in (None, "a@1", "a@2")] == [2.0, 1.0, 2.0]
    assert (await service.models())[0].versions == ("a@2", "a@1")
    service.take({"a": Numbered("a", 3)})
    with pytest.raises(UnknownScorer, match="a@1"):
        await reward(service, "a@1")


async def test_retired_scorer_is_closed_after_its_last_call() -> None:
    old = Numbered("a", 1)
    old.release.clear()
    service = service_of(old)
    call = asyncio.create_task(reward(service))
    await old.started.wait()
    for number in (2, 3):
        service.take({"a": Numbered("a", number)})
    assert await reward(service) == 3.0
    assert not old.is_closed
    old.release.set()
    assert await call == 1.0
    assert old.is_closed


async def test_late_replica_serves_the_previous_version_too(reward_model_folder: Path, tmp_path: Path) -> None:
    old, new = published(reward_model_folder), published(moved_model(reward_model_folder, tmp_path / "new"))
    versions = ModelVersions({REWARD_MODEL: old}, {REWARD_MODEL: old}).followed_by(REWARD_MODEL, new)
    early, late = RewardService(RewardServiceConfig()), RewardService(RewardServiceConfig())
    await early.load(ModelVersions({REWARD_MODEL: old}, {REWARD_MODEL: old}))
    for service in (early, late):
        await service.load(ModelVersions.from_json(json.loads(json.dumps(versions.to_json()))))
    rewards = [
        [await reward(service, f"reward_model@{model.digest}") for model in (old, new)] for service in (early, late)
    ]
    assert rewards[0] == rewards[1]
    assert [await reward(service) for service in (early, late)] == [rewards[0][1]] * 2


async def test_new_version_of_one_model_keeps_those_of_the_others(reward_model_folder: Path, tmp_path: Path) -> None:
    old, new = published(reward_model_folder), published(moved_model(reward_model_folder, tmp_path / "new"))
    config = RewardServiceConfig.model_validate(
        {"scorers": {"b": {"kind": "reward_model", "path": str(reward_model_folder)}}}
    )
    first = ModelVersions({REWARD_MODEL: old, "b": old}, {REWARD_MODEL: old, "b": old})
    second = first.followed_by(REWARD_MODEL, new)
    third = second.followed_by("b", new)
    for followed in ((first, second, third), (third,)):
        service = RewardService(config)
        for versions in followed:
            await service.load(versions)
        for name in (REWARD_MODEL, "b"):
            old_reward, new_reward = [await reward(service, f"{name}@{model.digest}") for model in (old, new)]
            assert old_reward != new_reward == await reward(service, name)


async def test_current_scorers_stay_if_a_folder_changed_since_publication(
    reward_model_folder: Path, tmp_path: Path
) -> None:
    old, folder = published(reward_model_folder), moved_model(reward_model_folder, tmp_path / "new")
    new = published(folder)
    first = ModelVersions({REWARD_MODEL: old}, {REWARD_MODEL: old})
    service = RewardService(RewardServiceConfig())
    await service.load(first)
    shutil.copy(reward_model_folder / "model.safetensors", folder)
    with pytest.raises(
        InputError, match=rf"{folder} contains reward_model@{old.digest}, but reward_model@{new.digest} was published"
    ):
        await service.load(first.followed_by(REWARD_MODEL, new))
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=rf"no reward model in {folder}"):
        await service.load(first.followed_by(REWARD_MODEL, new))
    assert (await service.models())[0].versions == (f"reward_model@{old.digest}",)


async def test_replica_is_unhealthy_if_a_call_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "HUNG_AFTER", 0.01)
    stuck = Numbered("a", 1)
    stuck.release.clear()
    service = RewardService(RewardServiceConfig(scorer="a", timeout_s=0.1))
    service.take({"a": stuck})
    await service.check_health()
    call = asyncio.create_task(reward(service))
    await stuck.started.wait()
    await asyncio.sleep(0.01)
    with pytest.raises(RewardError, match="its scorer hangs"):
        await service.check_health()
    stuck.release.set()
    assert await call == 1.0
    await service.check_health()
