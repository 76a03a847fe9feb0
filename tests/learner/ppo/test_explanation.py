"""An explained step returns one trajectory's numbers and trains as an ordinary step."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import LearnerError
from learner.config import LearnerConfig
from learner.place import Place
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory, write_policy

CONFIG = LearnerConfig(num_learners=0, num_epochs=2, num_minibatches=2, learning_rate=1e-2, critic="separate")


@pytest.mark.ray
async def test_an_explained_step_trains_as_usual_and_returns_its_numbers(tmp_path: Path, ray_session: None) -> None:
    from learner.ppo.group import PPOLearnerGroup
    from learner.ppo.rank import LearnerSettings

    policy = write_policy(tmp_path / "policy")
    groups = [[make_two_turn_trajectory(0)], *([make_trajectory(index)] for index in range(1, 4))]
    settings = LearnerSettings(CONFIG, Place(policy), version=1)
    plain, asked = [await PPOLearnerGroup.start(settings) for _ in range(2)]
    result = await plain.step(2, groups)
    explanation = await asked.explain(2, groups, "0-0-two")
    after = {tensor.name: tensor.checksum for tensor in (await asked.publish_initial()).tensors}
    assert result.manifest.changed_tensors(after) == [], "an explained step is a step like any other"
    (trajectory,) = groups[0]
    for numbers in (explanation.advantages, explanation.before, explanation.after):
        assert [number != 0.0 for number in numbers] == trajectory.mask
    assert explanation.before != explanation.after
    assert not any(explanation.values), "a new critic's values are 0"
    later = await asked.explain(3, groups, "0-0-two")
    assert [value != 0.0 for value in later.values] == trajectory.mask
    assert later.before == pytest.approx(explanation.after, abs=1e-6)
    with pytest.raises(LearnerError, match="trajectory missing: it was not trained in this step"):
        await plain.explain(3, groups, "missing")
    with pytest.raises(LearnerError, match="step 2 was asked for, but the next one is 4"):
        await asked.explain(2, groups, "0-0-two")
    await asked.shutdown()
