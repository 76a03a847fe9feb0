"""A whole step on one rank: its effects, its invariances and its errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import InputError, LearnerError
from cluster.trajectory import Trajectory
from learner.config import LearnerConfig, LoraConfig
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic, ModelSettings, Reference
from learner.place import Place
from learner.ppo.batch import make_batch
from learner.ppo.experience import Experience
from learner.ppo.rank import LearnerSettings
from learner.ppo.schedule import Lengths
from learner.ppo.shares import Share
from learner.ppo.step import PPOStep
from learner.ppo.weights import published_tensors
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory, write_policy

CPU = torch.device("cpu")
CONFIG = LearnerConfig(num_epochs=2, num_minibatches=2, learning_rate=1e-3, entropy_coefficient=0.01)

FROZEN: dict[str, Any] = {"value_coefficient": 0.0, "num_epochs": 1}


def trained_settings(config: LearnerConfig, place: Place) -> ModelSettings:
    return LearnerSettings(config, place, 0.7).model()


class OneRank:
    """A learner without Ray or RLlib."""

    def __init__(
        self,
        path: Path,
        config: LearnerConfig = CONFIG,
        lengths: Lengths = (),
        *,
        max_tokens: int = 16_384,
        sgd: bool = False,
        reference: Path | None = None,
        dtype: str = "float32",
    ) -> None:
        config = config.model_copy(update={"micro_batch_tokens": max_tokens})
        self.model = ActorCritic(trained_settings(config, Place(path, dtype)))
        own = ActorCritic(ModelSettings(reference or path, dtype, "none", 0.7)).requires_grad_(False)
        self.reference = Reference(self.model if config.lora.rank else own)
        adam = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0, fused=True)
        optimizer = torch.optim.SGD(self.model.parameters()) if sgd else adam
        ranks = Ranks(CPU, distributed=False)
        parts = (config, self.model, self.reference, optimizer, ranks)
        self._step = PPOStep(*parts, device=CPU, seed=0, lengths=lengths)

    def step(self, step: int, trajectories: list[Trajectory]) -> dict[str, float]:
        return self._step.run(step, Share(trajectories, range(len(trajectories)), len(trajectories)))

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest relative norm of the difference over all tensors."""
    return max(float((tensor - right[name]).norm() / tensor.norm().clamp(min=1e-12)) for name, tensor in left.items())


def batch(num: int = 8, **kwargs: Any) -> list[Trajectory]:
    return [make_trajectory(index, **kwargs) for index in range(num)]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_step_moves_policy_and_critic_and_leaves_the_reference(policy_path: Path, critic: Any) -> None:
    learner = OneRank(policy_path, CONFIG.model_copy(update={"critic": critic}))
    before = learner.weights()
    metrics = learner.step(1, [*batch(7), make_two_turn_trajectory(7, version=-1)])
    after = learner.weights()
    unmoved = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert unmoved == []
    for name, parameter in learner.reference._model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert metrics["cluster/policy_lag_max"] == 1
    assert metrics["learner/entropy_nats"] > 0


def test_good_responses_become_likelier_after_steps_on_a_batch(policy_path: Path) -> None:
    config = LearnerConfig(num_epochs=4, learning_rate=1e-3, kl_coefficient=0.0, gae_lambda=1.0)
    learner = OneRank(policy_path, config)
    trajectories = [replace(make_trajectory(i), reward=float(i % 2)) for i in range(16)]
    padded = make_batch(trajectories)
    before = learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum(1)
    for _ in range(3):
        learner.step(1, trajectories)
    gain = (learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum(1) - before).detach()
    assert gain[1::2].mean() > 0 > gain[::2].mean()


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_the_better_of_two_responses_becomes_likelier_without_critic(policy_path: Path, estimator: Any) -> None:
    settings = LearnerConfig(num_epochs=4, learning_rate=1e-3, kl_coefficient=0.0, advantages=estimator)
    learner = OneRank(policy_path, settings)
    assert not [name for name in learner.weights() if not name.startswith("policy.")]
    trajectories = [replace(make_trajectory(i), group=i // 2, reward=float(i // 2 + i % 2)) for i in range(16)]
    padded = make_batch(trajectories)
    before = learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum(1)
    for _ in range(3):
        metrics = learner.step(1, trajectories)
    gain = (learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum(1) - before).detach()
    assert gain[1::2].mean() > 0 > gain[::2].mean()
    assert metrics["learner/value_loss"] == 0


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"])
def test_micro_batches_change_only_rounding(policy_path: Path, aggregation: Any) -> None:
    config = CONFIG.model_copy(update={"loss_aggregation": aggregation})
    whole, pieces = OneRank(policy_path, config, sgd=True), OneRank(policy_path, config, max_tokens=24, sgd=True)
    metrics = [learner.step(1, batch()) for learner in (whole, pieces)]
    assert largest_difference(whole.weights(), pieces.weights()) < 1e-6
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-6)


def test_the_width_of_the_padding_changes_only_rounding(policy_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_minibatches": 1})
    plain, wide = OneRank(policy_path, config, sgd=True), OneRank(policy_path, config, sgd=True)
    longest = make_two_turn_trajectory(8, version=-1)
    plain.step(1, [*batch(), longest])
    trailing = replace(
        longest,
        token_ids=longest.token_ids + [1] * 20,
        mask=longest.mask + [False] * 20,
        behavior_logprobs=longest.behavior_logprobs + [0.0] * 20,
    )
    wide.step(1, [*batch(), trailing])
    assert largest_difference(plain.weights(), wide.weights()) < 1e-6


def test_reusing_the_first_forward_pass_changes_no_bit(policy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"num_minibatches": 1})
    reusing, repeating = OneRank(policy_path, config), OneRank(policy_path, config)
    evaluate = repeating._step._evaluate
    monkeypatch.setattr(repeating._step, "_evaluate", lambda batch, keep_graph: evaluate(batch, keep_graph=False))
    assert reusing.step(1, batch()) == repeating.step(1, batch())
    assert largest_difference(reusing.weights(), repeating.weights()) == 0


def test_the_engines_logprobs_change_no_bit_at_lag_zero(policy_path: Path) -> None:
    exact, noisy = OneRank(policy_path), OneRank(policy_path)
    trajectories = batch()
    padded = make_batch(trajectories)
    own = exact.reference.logprobs(padded.token_ids, padded.mask, padded.lengths).tolist()
    trajectories = [replace(t, behavior_logprobs=own[i][: len(t.token_ids)]) for i, t in enumerate(trajectories)]
    shifted = [
        replace(t, behavior_logprobs=[p + 0.25 if m else 0.0 for p, m in zip(t.behavior_logprobs, t.mask, strict=True)])
        for t in trajectories
    ]
    metrics, noisy_metrics = exact.step(1, trajectories), noisy.step(1, shifted)
    assert largest_difference(exact.weights(), noisy.weights()) == 0
    assert metrics["learner/engine_logprob_difference_max"] < 1e-5
    assert noisy_metrics["learner/engine_logprob_difference_mean"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["learner/importance_weight_mean"] == 1.0


def test_stale_tokens_are_weighted_by_the_engines_logprobs(policy_path: Path) -> None:
    learner = OneRank(policy_path)
    metrics = learner.step(2, batch(version=0))
    assert metrics["cluster/policy_lag_mean"] == 1
    assert metrics["learner/importance_weight_mean"] != 1.0


def test_the_value_lambda_changes_returns_but_not_advantages(policy_path: Path) -> None:
    plain, same, other = (
        OneRank(policy_path, LearnerConfig(learning_rate=1e-3, gae_lambda=0.5, gae_value_lambda=lam, **FROZEN))
        for lam in (None, 0.5, 1.0)
    )
    losses = [learner.step(1, batch())["learner/value_loss"] for learner in (plain, same, other)]
    assert losses[0] == losses[1] != losses[2]
    assert largest_difference(plain.weights(), same.weights()) == 0
    policy = [{n: t for n, t in learner.weights().items() if n.startswith("policy.")} for learner in (plain, other)]
    assert largest_difference(*policy) == 0


def test_kl_is_summed_per_response_and_reward_excludes_the_penalty(policy_path: Path) -> None:
    learner = OneRank(policy_path)
    trajectories = batch(version=0)
    padded = make_batch(trajectories)
    reference = learner.reference.logprobs(padded.token_ids, padded.mask, padded.lengths)
    kl = [
        sum(p - float(q) for p, q, m in zip(t.behavior_logprobs, row, t.mask, strict=False) if m)
        for t, row in zip(trajectories, reference, strict=True)
    ]
    metrics = learner.step(2, trajectories)
    assert metrics["learner/kl_nats"] == pytest.approx(sum(kl) / len(kl), abs=1e-4)
    num_tokens = sum(t.num_response_tokens for t in trajectories)
    assert metrics["learner/kl_nats_per_token"] == pytest.approx(sum(kl) / num_tokens, abs=1e-5)
    assert metrics["learner/reward_mean"] == pytest.approx(sum(t.reward or 0.0 for t in trajectories) / 8, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_pulls_a_policy_back_to_its_reference(policy_path: Path, tmp_path: Path, estimator: Any) -> None:
    away = write_policy(tmp_path / "away", seed=1)
    config = LearnerConfig(num_epochs=8, learning_rate=1e-3, kl_coefficient=1.0, kl_in="loss", kl_estimator=estimator)
    learner = OneRank(away, config, reference=policy_path)
    trajectories = [replace(t, reward=0.0) for t in batch(16)]
    padded = make_batch(trajectories)
    reference = learner.reference.logprobs(padded.token_ids, padded.mask, padded.lengths)

    def distance() -> float:
        own = learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.detach()
        return float((own - reference).abs().sum())

    before = distance()
    learner.step(1, trajectories)
    assert distance() < 0.9 * before


def test_the_kl_coefficient_adapts_to_its_target(policy_path: Path) -> None:
    near: dict[str, Any] = {"kl_horizon": 100.0, "kl_coefficient": 0.1}
    low, high = (OneRank(policy_path, LearnerConfig(kl_target=target, **near)) for target in (1e-3, 1e3))
    for learner in (low, high):
        learner.step(2, batch())
    metrics = low.step(3, batch()), high.step(3, batch())
    assert [m["learner/kl_coefficient"] for m in metrics] == pytest.approx([0.1 * 1.016, 0.1 * 0.984])


def test_an_error_names_a_trajectory_of_a_future_version(policy_path: Path) -> None:
    with pytest.raises(LearnerError, match="trajectory 0-3-0: sampled by version 1, step 1 starts from 0"):
        OneRank(policy_path).step(1, [*batch(3), make_trajectory(3, version=1)])


def test_an_error_names_trajectories_if_the_gradient_is_not_finite(policy_path: Path) -> None:
    learner = OneRank(policy_path, CONFIG.model_copy(update={"num_minibatches": 1}))
    before = learner.weights()
    assert learner.model.value_head is not None
    learner.model.value_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(LearnerError, match=r"trajectories 0-0-0, 0-1-0.*: the gradient is not finite"):
        learner.step(1, batch())
    assert largest_difference(before, learner.weights()) == 0


def test_an_error_names_the_trajectory_if_its_loss_is_not_finite(policy_path: Path) -> None:
    learner = OneRank(policy_path)
    with pytest.raises(LearnerError, match="trajectories 0-2-0: the loss is not finite"):
        learner.step(1, [replace(t, reward=3e38 if t.uid == "0-2-0" else t.reward) for t in batch()])


def test_steps_follow_the_schedule_in_force_at_their_time(policy_path: Path) -> None:
    line = CONFIG.model_copy(update={"learning_rate_schedule": "linear"})
    short, longer = (line.model_copy(update={"num_steps": num}) for num in (2, 8))
    ran, again, other = (
        OneRank(policy_path, short),
        OneRank(policy_path, longer, [(0, 2)]),
        OneRank(policy_path, longer),
    )
    for learner in (ran, again, other):
        learner.step(1, batch())
        learner.step(2, batch())
    assert largest_difference(ran.weights(), again.weights()) == 0
    assert largest_difference(ran.weights(), other.weights()) > 0


def test_an_update_that_moves_too_far_ends_before_its_last_optimiser_step(policy_path: Path) -> None:
    wild: dict[str, Any] = {"num_epochs": 6, "num_minibatches": 2, "learning_rate": 3e-2}
    free, held = (OneRank(policy_path, LearnerConfig(**wild, max_step_kl_nats=limit)) for limit in (None, 0.05))
    metrics = [learner.step(1, batch()) for learner in (free, held)]
    assert metrics[0]["learner/num_optimizer_steps"] == 12
    assert 1 <= metrics[1]["learner/num_optimizer_steps"] < 12
    assert metrics[0]["learner/step_kl_nats_per_token"] > metrics[1]["learner/step_kl_nats_per_token"]
    assert largest_difference(free.weights(), held.weights()) > 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_policy_does_not_change_in_the_critics_warm_up(policy_path: Path, critic: Any) -> None:
    learner = OneRank(policy_path, CONFIG.model_copy(update={"critic": critic, "critic_warmup_steps": 1}))
    start = learner.weights()
    learner.step(1, batch())
    warm = learner.weights()
    moved = {name for name, tensor in start.items() if not torch.equal(tensor, warm[name])}
    assert moved == {name for name in start if not name.startswith("policy.")}
    learner.step(2, batch())
    after = learner.weights()
    assert all(not torch.equal(tensor, after[name]) for name, tensor in warm.items())


def test_a_critic_can_start_as_the_reward_model(policy_path: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    reward_model = AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1, dtype=torch.float32)
    reward_model.config.pad_token_id = 0
    with torch.no_grad():
        reward_model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    reward_model.save_pretrained(tmp_path / "reward_model")
    config = LearnerConfig(critic="separate", critic_from="reward_model")
    model = ActorCritic(trained_settings(config, Place(policy_path, critic_path=tmp_path / "reward_model")))
    padded = make_batch(batch())
    values = model(padded.token_ids, padded.mask, padded.lengths).values
    for row, length in enumerate(padded.lengths):
        before_last = padded.token_ids[row : row + 1, : length - 1]
        expected = reward_model(input_ids=before_last).logits[0, 0]
        torch.testing.assert_close(values[row, length - 1], expected, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="critic_from: there is no reward model"):
        trained_settings(config, Place(policy_path))


def test_only_adapters_are_trained_and_the_reference_has_none(policy_path: Path) -> None:
    config = CONFIG.model_copy(update={"lora": LoraConfig(rank=4)})
    learner, plain = OneRank(policy_path, config), OneRank(policy_path)
    padded = make_batch(batch())
    model_inputs = (padded.token_ids, padded.mask, padded.lengths)
    start = learner.weights()
    assert torch.equal(learner.reference.logprobs(*model_inputs), plain.reference.logprobs(*model_inputs))
    learner.step(1, batch())
    moved = {name for name, tensor in learner.weights().items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if "lora_" in name or name.startswith("value_head")}
    assert torch.equal(learner.reference.logprobs(*model_inputs), plain.reference.logprobs(*model_inputs))
    merged = ActorCritic(ModelSettings(policy_path, "float32", "none", 0.7))
    merged.policy.load_state_dict(dict(published_tensors(learner.model.policy, torch.float32)))
    own = learner.model(*model_inputs).logprobs.detach()
    torch.testing.assert_close(merged(*model_inputs).logprobs, own, atol=1e-5, rtol=0)
    assert float((own - learner.reference.logprobs(*model_inputs)).abs().max()) > 1e-3


@pytest.mark.parametrize("objective", ["gspo", "cispo"])
def test_other_objectives_also_make_good_responses_likelier(policy_path: Path, objective: Any) -> None:
    config = LearnerConfig(
        num_epochs=4, learning_rate=1e-3, kl_coefficient=0.0, advantages="rloo", policy_objective=objective
    )
    learner = OneRank(policy_path, config)
    trajectories = [replace(make_trajectory(i), group=i // 2, reward=float(i % 2)) for i in range(16)]
    padded = make_batch(trajectories)
    before = learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum(1)
    learner.step(1, trajectories)
    gain = (learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum(1) - before).detach()
    assert gain[1::2].mean() > 0 > gain[::2].mean()


def test_the_weights_do_not_change_if_a_loss_is_not_finite(policy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = OneRank(policy_path, CONFIG.model_copy(update={"num_minibatches": 1}))
    start = learner.weights()
    compute = learner._step.computer.compute

    def spoiled(step: int, evaluation: Any) -> Experience:
        experience = compute(step, evaluation)
        experience.advantages[2] = float("nan")
        return experience

    monkeypatch.setattr(learner._step.computer, "compute", spoiled)
    with pytest.raises(LearnerError, match="trajectories 0-2-0: the loss is not finite") as caught:
        learner.step(1, batch())
    assert caught.value.uids == ("0-2-0",)
    assert largest_difference(start, learner.weights()) == 0


def test_an_error_names_the_trajectory_if_a_logprob_is_not_finite(
    policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = OneRank(policy_path)
    logprobs = learner.reference.logprobs

    def spoiled(*arguments: Any) -> Tensor:
        found = logprobs(*arguments)
        found[2, -1] = float("nan")
        return found

    monkeypatch.setattr(learner.reference, "logprobs", spoiled)
    with pytest.raises(LearnerError, match="trajectories 0-2-0: a log-probability or value is not finite"):
        learner.step(1, batch())


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_pp_baseline", "gae"])
def test_skipped_groups_leave_the_step_as_it_is_without_them(policy_path: Path, estimator: Any) -> None:
    settings: dict[str, Any] = {"advantages": estimator, "kl_in": "loss", "kl_estimator": "k3", "learning_rate": 1e-3}
    config = LearnerConfig(**settings, zero_variance_groups="skip")
    informative = [replace(make_trajectory(i), group=i // 4, reward=float(i % 2)) for i in range(8)]
    equal = [replace(make_trajectory(i), group=i // 4, reward=0.1) for i in range(8, 16)]
    whole, alone = OneRank(policy_path, config, sgd=True), OneRank(policy_path, config, sgd=True)
    metrics = whole.step(1, [*informative, *equal])
    alone.step(1, informative)
    assert largest_difference(alone.weights(), whole.weights()) < 1e-6
    assert metrics["learner/num_optimizer_steps"] == 2


def test_a_step_of_equal_rewards_trains_nothing_if_they_are_skipped(policy_path: Path) -> None:
    config = LearnerConfig(advantages="grpo", learning_rate=1e-2, zero_variance_groups="skip")
    learner = OneRank(policy_path, config)
    before = learner.weights()
    metrics = learner.step(1, [replace(make_trajectory(i), group=i // 2, reward=0.3) for i in range(4)])
    assert metrics["learner/num_optimizer_steps"] == 0
    assert largest_difference(before, learner.weights()) == 0
