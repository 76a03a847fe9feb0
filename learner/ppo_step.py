"""One PPO step on one rank: from scored trajectories to changed weights and the figures of the step.

The step's story, and all of its state but the optimiser's; the only part of the mathematics that knows of other
ranks. Knows neither RLlib nor publication nor files.

Shapes: B trajectories of this rank, T tokens of the longest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cluster.errors import LearnerError
from cluster.trajectory import Trajectory
from learner import advantages as adv
from learner import losses
from learner.actor_critic import ActorCritic, Outputs, sampled_token_logprobs
from learner.batching import Batch, make_batch, micro_batches, minibatch_order
from learner.config import LearnerConfig
from learner.ranks import Ranks

MAX_MICRO_BATCH_TOKENS = 16_384
MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's trajectories of a step: those from number `first` on of `num_total`, in admission order."""

    trajectories: Sequence[Trajectory]
    first: int
    num_total: int


class Count(NamedTuple):
    """What the ranks' shares of a mini-batch hold together."""

    tokens: float
    sequences: float


@dataclass(slots=True)
class Experience:
    """What the weights before the step make of a batch, [B, T] each; constant over its epochs.

    `behavior` are the log-probabilities that the tokens count as sampled with. `graph` is the forward pass of the
    whole batch with its gradient graph, where the first optimiser step can use it instead of computing it again.
    """

    batch: Batch
    proximal: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor
    behavior: Tensor
    advantages: Tensor
    returns: Tensor
    graph: Outputs | None


class PPOStep:
    """Proximal Policy Optimization (arXiv:1707.06347) on `model`, in place; every rank calls it for every step.

    `kl_coefficient` is the next step's; what a run that goes on must be given back.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: ActorCritic,
        reference: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        device: torch.device,
        seed: int,
        max_micro_batch_tokens: int = MAX_MICRO_BATCH_TOKENS,
    ) -> None:
        self._config = config
        self._model = model
        self._reference = reference
        self._optimizer = optimizer
        self._ranks = ranks
        self._device = device
        self._seed = seed
        self._max_tokens = max_micro_batch_tokens
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.kl_coefficient = config.kl_coefficient

    def run(self, step: int, share: Share) -> dict[str, float]:
        """All epochs and mini-batches on one batch; returns its metrics, equal on all ranks.

        Waits for the other ranks. Raises LearnerError naming trajectories before the weights are touched by anything
        that is not finite, and StoppedWithPeer where another rank did.
        """
        with self._ranks.agreed():
            batch = make_batch(share.trajectories, device=self._device)
            _refuse_future(batch, step)
            plan = self._plan(step, share)
            experience = self._evaluate(batch, keep_graph=self._config.num_minibatches == 1)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, step)
        tally = Tally(self._ranks)
        self._judge(step, experience, tally)
        counts = self._ranks.all_sum(
            torch.tensor([float(batch.mask[rows].sum()) for rows in plan], dtype=torch.float64)
        ).tolist()
        num_sequences = share.num_total / self._config.num_minibatches
        for rows, num_tokens in zip(plan, counts, strict=True):
            self._optimize(experience, rows, Count(num_tokens, num_sequences), tally)
        metrics = tally.metrics()
        self._steer_kl(metrics["learner/kl_nats"], share.num_total)
        return metrics

    def _steer_kl(self, kl_nats: float, num_episodes: int) -> None:
        """The next step's coefficient, the same on all ranks, because the mean KL is that of all."""
        target, horizon = self._config.kl_target, self._config.kl_horizon
        if target is not None:
            self.kl_coefficient = adv.adapted_kl_coefficient(
                self.kl_coefficient, kl_nats, target=target, horizon=horizon, num_episodes=num_episodes
            )

    def _plan(self, step: int, share: Share) -> list[list[int]]:
        """This rank's rows of every optimiser step, epoch after epoch."""
        own = range(share.first, share.first + len(share.trajectories))
        num_minibatches = self._config.num_minibatches
        return [
            [index - share.first for index in minibatch if index in own]
            for epoch in range(self._config.num_epochs)
            for minibatch in minibatch_order(
                share.num_total, num_minibatches=num_minibatches, seed=self._seed, step=step, epoch=epoch
            )
        ]

    def _evaluate(self, batch: Batch, *, keep_graph: bool) -> Experience:
        """Proximal and reference log-probabilities, entropies and values, before the first epoch."""
        pieces = micro_batches(batch.lengths, self._max_tokens)
        empty = torch.zeros(batch.mask.shape, device=self._device)
        proximal, reference, values, entropy = (empty.clone() for _ in range(4))
        outputs = None
        for rows in pieces:
            token_ids, mask = _piece(batch, rows, batch.token_ids, batch.mask)
            with torch.set_grad_enabled(keep_graph and len(pieces) == 1):
                outputs = self._model(token_ids, mask)
            width = mask.shape[1]
            proximal[rows, :width] = outputs.logprobs.detach()
            entropy[rows, :width] = outputs.entropy.detach()
            values[rows, :width] = outputs.values.detach()
            reference[rows, :width] = sampled_token_logprobs(self._reference, token_ids, mask, self._model.temperature)
        _check_finite(batch, proximal + values, "a log-probability or value")
        graph = outputs if keep_graph and len(pieces) == 1 else None
        behavior = batch.behavior_logprobs
        return Experience(batch, proximal, reference, values, entropy, behavior, empty, empty, graph)

    def _judge(self, step: int, experience: Experience, tally: Tally) -> None:
        """Rewards, advantages and returns; whitened by the statistics of all ranks.

        Where every token of the step was sampled by the weights it starts from, the proximal log-probabilities stand
        for the behaviour ones, so that synchronous PPO does not hang on the engine's last bits.
        """
        config, batch, mask = self._config, experience.batch, experience.batch.mask
        lag = (step - 1 - batch.versions)[mask]
        if float(self._ranks.all_max(lag.max().double())) == 0:
            experience.behavior = experience.proximal
        penalty = adv.KL_ESTIMATORS[config.kl_estimator](experience.behavior, experience.reference)
        coefficient = self.kl_coefficient if config.kl_in == "reward" else 0.0
        rewards = adv.token_rewards(
            batch.scores, penalty, mask, kl_coefficient=coefficient, turn_rewards=batch.turn_rewards
        )
        all_sum = self._ranks.all_sum
        self._estimate_advantages(experience, rewards)
        explained = adv.explained_variance(experience.values, experience.returns, mask, all_sum)
        tally.constant("learner/explained_variance", explained)
        tally.mean("learner/reward_mean", batch.scores)
        kl = adv.kl_k1(experience.behavior, experience.reference)
        tally.mean("learner/kl_nats", (kl * mask).sum(1))
        tally.mean("learner/kl_nats_per_token", kl[mask])
        tally.constant("learner/kl_coefficient", self.kl_coefficient)
        tally.mean("learner/entropy_nats", experience.entropy[mask])
        tally.mean("cluster/policy_lag_mean", lag)
        tally.max("cluster/policy_lag_max", lag)
        fresh = mask & (batch.versions == step - 1)
        difference = (batch.behavior_logprobs - experience.proximal).abs()[fresh]
        tally.mean("learner/engine_logprob_difference_mean", difference)
        tally.max("learner/engine_logprob_difference_max", difference)

    def _estimate_advantages(self, experience: Experience, rewards: Tensor) -> None:
        """By the critic, or each response against its group: a group is never spread over ranks."""
        config, mask = self._config, experience.batch.mask
        if config.advantages == "gae":
            given = (rewards, experience.values, mask)
            advantages, experience.returns = adv.gae(*given, gamma=config.gamma, lam=config.gae_lambda)
            if config.gae_value_lambda is not None:
                _, experience.returns = adv.gae(*given, gamma=config.gamma, lam=config.gae_value_lambda)
        else:
            whole = adv.group_advantages(rewards.sum(1), experience.batch.groups, config.advantages)
            advantages = torch.where(mask, whole[:, None], 0.0)
        whiten = config.advantages == "gae" if config.whiten_advantages is None else config.whiten_advantages
        if whiten:
            advantages = adv.whiten(advantages, mask, adv.masked_moments(advantages, mask, self._ranks.all_sum))
        experience.advantages = advantages

    def _optimize(self, experience: Experience, rows: list[int], count: Count, tally: Tally) -> None:
        """One optimiser step on these rows of this rank, `count` with those of the others."""
        self._optimizer.zero_grad(set_to_none=True)
        uids = [experience.batch.uids[row] for row in rows]
        with self._ranks.agreed():
            for piece in micro_batches([experience.batch.lengths[row] for row in rows], self._max_tokens):
                self._accumulate(experience, [rows[index] for index in piece], count, tally)
            if self._ranks.size > 1:
                self._check_gradients(uids)
        self._ranks.sum_gradients(self._parameters)
        norm = self._check_gradients(uids)
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._config.max_grad_norm, norm)
        self._optimizer.step()
        tally.constant("learner/grad_norm", float(norm))

    def _accumulate(self, experience: Experience, rows: list[int], count: Count, tally: Tally) -> None:
        """Add the gradient of these rows' share of the loss."""
        config, batch = self._config, experience.batch
        token_ids, mask = _piece(batch, rows, batch.token_ids, batch.mask)
        outputs, experience.graph = experience.graph or self._model(token_ids, mask), None
        proximal, behavior, advantages, old_values, returns = _piece(
            batch,
            rows,
            experience.proximal,
            experience.behavior,
            experience.advantages,
            experience.values,
            experience.returns,
        )
        policy = losses.policy_loss(
            outputs.logprobs,
            proximal_logprobs=proximal,
            behavior_logprobs=behavior,
            advantages=advantages,
            clip=config.clip,
            importance_cap=config.importance_cap,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        value = losses.value_loss(outputs.values, old_values=old_values, returns=returns, clip=config.value_clip)
        per_token = policy.loss + config.value_coefficient * value
        if config.kl_in == "loss":
            (reference,) = _piece(batch, rows, experience.reference)
            penalty = adv.KL_ESTIMATORS[config.kl_estimator](outputs.logprobs, reference)
            per_token = per_token + self.kl_coefficient * penalty
        if config.entropy_coefficient:
            per_token = per_token - config.entropy_coefficient * outputs.entropy
        loss = losses.aggregate(
            per_token, mask, config.loss_aggregation, num_tokens=count.tokens, num_sequences=count.sequences
        )
        if not torch.isfinite(loss):
            _check_finite(batch, torch.where(mask, per_token, 0.0), "the loss", rows)
        loss.backward()
        tally.mean("learner/policy_loss", policy.loss[mask])
        tally.mean("learner/value_loss", value[mask])
        tally.mean("learner/clip_fraction", policy.is_clipped[mask])
        tally.mean("learner/ratio_mean", policy.ratio[mask])
        tally.max("learner/ratio_max", policy.ratio[mask])
        tally.mean("learner/importance_weight_mean", policy.importance_weight[mask])

    def _check_gradients(self, uids: Sequence[str]) -> Tensor:
        """The gradients' global norm. Raises LearnerError naming the trajectories where it is not finite."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise LearnerError(_named(uids), f"the gradient is not finite (norm {float(norm)})", uids=uids)
        return norm


def learning_rate(config: LearnerConfig, step: int) -> float:
    """The learning rate of a step, a function of its number alone, so that a resumed run goes on with it."""
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    return config.learning_rate * max(0.0, 1 - (step - 1) / config.num_steps)


class Tally:
    """Sums up the figures of a step, for all ranks at its end. Every rank must tally the same names."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)
        self._maxima: dict[str, list[Tensor]] = defaultdict(list)
        self._constants: dict[str, list[float]] = defaultdict(list)

    def mean(self, name: str, values: Tensor) -> None:
        """Take `values` into the mean over everything tallied under `name`; 0 if that is nothing."""
        self._sums[name].append(values.detach().sum(dtype=torch.float64))
        self._counts[name] += values.numel()

    def max(self, name: str, values: Tensor) -> None:
        """Take `values` into the maximum; 0 if there is none."""
        if values.numel():
            self._maxima[name].append(values.detach().max().double())
        else:
            self._maxima[name].append(values.new_zeros((), dtype=torch.float64))

    def constant(self, name: str, value: float) -> None:
        """A figure that is the same on all ranks; the mean of those given."""
        self._constants[name].append(value)

    def metrics(self) -> dict[str, float]:
        """All figures; waits for the other ranks."""
        sums = torch.stack([torch.stack(values).sum() for values in self._sums.values()])
        counts = sums.new_tensor(list(self._counts.values()))
        sums, counts = self._ranks.all_sum(torch.stack([sums, counts]))
        maxima = self._ranks.all_max(torch.stack([torch.stack(values).max() for values in self._maxima.values()]))
        return {
            **dict(zip(self._sums, (sums / counts.clamp(min=1)).tolist(), strict=True)),
            **dict(zip(self._maxima, maxima.tolist(), strict=True)),
            **{name: sum(values) / len(values) for name, values in self._constants.items()},
        }


def _piece(batch: Batch, rows: list[int], *tensors: Tensor) -> list[Tensor]:
    """These rows of tensors [B, T], cut to the longest of them."""
    width = max(batch.lengths[row] for row in rows)
    if rows == list(range(len(batch.lengths))):
        return [tensor[:, :width] for tensor in tensors]
    return [tensor[rows, :width] for tensor in tensors]


def _refuse_future(batch: Batch, step: int) -> None:
    for uid, versions in zip(batch.uids, batch.versions, strict=True):
        if int(versions.max()) > step - 1:
            what = f"sampled by version {int(versions.max())}, step {step} starts from {step - 1}"
            raise LearnerError(f"trajectory {uid}", what, uids=[uid])


def _check_finite(batch: Batch, per_token: Tensor, what: str, rows: Sequence[int] | None = None) -> None:
    finite = torch.isfinite(per_token).all(1).tolist()
    uids = batch.uids if rows is None else [batch.uids[row] for row in rows]
    bad = [uid for uid, ok in zip(uids, finite, strict=True) if not ok]
    if bad:
        raise LearnerError(_named(bad), f"{what} is not finite", uids=bad)


def _named(uids: Sequence[str]) -> str:
    more = f" and {len(uids) - MAX_NAMED} more" if len(uids) > MAX_NAMED else ""
    return f"trajectories {', '.join(uids[:MAX_NAMED])}{more}"
