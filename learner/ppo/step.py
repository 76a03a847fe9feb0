"""One PPO step on one rank: evaluate a batch, compute its advantages, train all epochs.

Shapes: B trajectories of this rank, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cluster.errors import LearnerError
from learner.config import LearnerConfig, schedule_of
from learner.distributed.gradients import clip_gradients, gradient_norm
from learner.distributed.metrics import StepMetrics
from learner.distributed.ranks import Ranks
from learner.learning_rates import default_learning_rate
from learner.model.actor_critic import ActorCritic, Outputs, Reference
from learner.model.indexing import at, on_device, places_of
from learner.model.lora import num_parameters
from learner.model.microbatches import micro_batches
from learner.ppo import advantages as adv
from learner.ppo import losses
from learner.ppo.batch import Batch, make_batch, minibatch_order
from learner.ppo.experience import AdvantageComputer, Evaluation, Experience, trained_rows
from learner.ppo.experience_metrics import log_experience
from learner.ppo.schedule import Lengths, Phase, length_at, phase_at, scheduled
from learner.ppo.sequences import Compute, by_sequence
from learner.ppo.shares import Share

MAX_NAMED = 8


class MiniBatch(NamedTuple):
    """This rank's rows of an optimiser step, and its numbers of tokens and sequences over all ranks."""

    rows: list[int]
    num_tokens: float
    num_sequences: float


class PPOStep:
    """Proximal Policy Optimization (arXiv:1707.06347) on `model`, in place.

    Collective: call it on every rank.

    `computer` holds the state between steps. `tasks` are the run's task names, if it names any. `lengths` are the
    planned numbers of steps (default: `config.num_steps`). `phases` are the settings of each time (default: `config`).
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: ActorCritic,
        reference: Reference,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        device: torch.device,
        seed: int,
        tasks: Sequence[str] = (),
        lengths: Lengths = (),
        phases: Sequence[Phase] = (),
    ) -> None:
        self._config = config
        self._phases = phases
        self._model = model
        self._reference = reference
        self._optimizer = optimizer
        self._ranks = ranks
        self._device = device
        self._seed = seed
        self._lengths = lengths
        self._graph: Outputs | None = None
        self._num_parameters = num_parameters(model.policy)
        self.computer = AdvantageComputer(config, ranks, tasks)

    def run(
        self, step: int, share: Share, *, on_experience: Callable[[Experience], None] = lambda experience: None
    ) -> dict[str, float]:
        """Train all epochs and mini-batches on one batch; returns its metrics, equal on all ranks.

        Calls `on_experience` with the experience before training on it. Collective. Raises LearnerError naming the
        trajectories if anything is not finite, before the weights change, and StoppedWithPeer if another rank did.
        """
        self._use_phase(step)
        with self._ranks.agreed():
            batch = make_batch(share.trajectories, device=self._device, cost=self._config.constraint.cost)
            _refuse_future(batch, step)
            self.computer.require_known(batch)
            plan = self._plan(step, share, trained_rows(batch, self._config))
        keep_graph = self._config.num_minibatches == 1 and self._config.zero_variance_groups != "skip"
        evaluation = self._evaluate(batch, keep_graph=keep_graph)
        with self._ranks.agreed():
            total = evaluation.proximal + evaluation.reference + evaluation.values
            _check_finite(batch, total, "a log-probability or value")
        experience = self.computer.compute(step, evaluation)
        on_experience(experience)
        metrics = StepMetrics(self._ranks)
        log_experience(step, experience, self.computer, self._ranks, metrics)
        num_done = self._train(step, experience, self._counted(batch, plan), metrics)
        metrics.constant("learner/num_optimizer_steps", num_done)
        values = metrics.metrics()
        self.computer.steer_kl(values["learner/kl_nats"], share.num_total)
        self.computer.steer_multiplier(values)
        return values

    def _use_phase(self, step: int) -> None:
        """Switch to the settings that were in force at `step`, if any were recorded."""
        phase = phase_at(step, self._phases)
        if phase is None:
            return
        self._config = phase.config
        self.computer.use(phase.config)
        self._model.use(phase.config, phase.temperature)
        self._reference.use(phase.config, phase.temperature)
        for group in self._optimizer.param_groups:
            group["weight_decay"] = phase.config.weight_decay

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """Compute log-probabilities [B, T] with the current weights, 0 where the mask is false."""
        found = torch.zeros(batch.mask.shape, dtype=self._model.numbers, device=self._device)
        for rows in self._pieces(batch.lengths):
            sequences, (token_ids, mask) = _piece(batch, rows, batch.token_ids, batch.mask)
            (logprobs,) = self._computed(self._logprobs_only, token_ids, mask, sequences)
            if rows:
                found[rows, : mask.shape[1]] = logprobs
        return found

    def _computed(
        self, compute: Compute, token_ids: Tensor, mask: Tensor, sequences: Sequence[Sequence[int]]
    ) -> Sequence[Tensor]:
        """Compute rows of several sequences; in parts, unless ranks must call the model equally often."""
        max_tokens = None if self._model.is_sharded else self._config.micro_batch_tokens
        return by_sequence(compute, token_ids, mask, sequences, max_tokens=max_tokens)

    def _logprobs_only(self, token_ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> tuple[Tensor]:
        return (self._model(token_ids, mask, lengths, logprobs_only=True).logprobs,)

    def reference_kl(self, batch: Batch) -> list[float]:
        """Compute k1 from the behaviour policy to the reference, summed over each row, in nats."""
        sums = [0.0] * len(batch.uids)
        for rows in self._pieces(batch.lengths):
            sequences, (token_ids, mask, behavior) = _piece(
                batch, rows, batch.token_ids, batch.mask, batch.behavior_logprobs
            )
            (reference,) = self._computed(self._reference.outputs, token_ids, mask, sequences)
            for row, kl in zip(rows, (behavior - reference).sum(1).tolist(), strict=False):
                sums[row] = kl
        return sums

    def _plan(self, step: int, share: Share, trained: Tensor) -> list[list[int]]:
        """Return this rank's rows of every optimiser step, epoch after epoch, without those that are not trained."""
        is_trained = trained.tolist()
        row_of = {place: row for row, place in enumerate(share.places) if is_trained[row]}
        num_minibatches = self._config.num_minibatches
        return [
            [row_of[place] for place in minibatch if place in row_of]
            for epoch in range(self._config.num_epochs)
            for minibatch in minibatch_order(
                share.num_total, num_minibatches=num_minibatches, seed=self._seed, step=step, epoch=epoch
            )
        ]

    def _counted(self, batch: Batch, plan: list[list[int]]) -> list[MiniBatch]:
        """Add to the plan the numbers of tokens and sequences of all ranks; drop steps without any. Collective."""
        own = [[float(batch.mask[rows].sum()), float(len(rows))] for rows in plan]
        counts = self._ranks.all_sum(torch.tensor(own, dtype=torch.float64)).tolist()
        return [MiniBatch(rows, *numbers) for rows, numbers in zip(plan, counts, strict=True) if numbers[1]]

    def _evaluate(self, batch: Batch, *, keep_graph: bool) -> Evaluation:
        """Compute log-probabilities, entropies and values with the weights before the step.

        With `keep_graph`, the first optimiser step uses this forward pass again if it fits in one micro-batch.
        """
        pieces = self._pieces(batch.lengths)
        empty = torch.zeros(batch.mask.shape, dtype=self._model.numbers, device=self._device)
        proximal, reference, values, entropy = (empty.clone() for _ in range(4))
        outputs: Outputs | None = None
        keep_graph = keep_graph and len(pieces) == 1
        for rows in pieces:
            sequences, (token_ids, mask) = _piece(batch, rows, batch.token_ids, batch.mask)
            with torch.set_grad_enabled(keep_graph):
                outputs = Outputs(*self._computed(self._model, token_ids, mask, sequences))
            (reference_logprobs,) = self._computed(self._reference.outputs, token_ids, mask, sequences)
            if rows:
                index, width = on_device(rows, self._device), mask.shape[1]
                proximal[index, :width] = outputs.logprobs.detach()
                entropy[index, :width] = outputs.entropy.detach()
                values[index, :width] = outputs.values.detach()
                reference[index, :width] = reference_logprobs
        self._graph = outputs if keep_graph else None
        return Evaluation(batch, proximal, reference, values, entropy)

    def _pieces(self, lengths: Sequence[int]) -> list[list[int]]:
        """Plan micro-batches of these sequences; at least one, and equally many on every rank if sharded."""
        pieces = micro_batches(lengths, self._config.micro_batch_tokens, packed=self._config.packing) or [[]]
        if self._model.is_sharded:
            num = int(self._ranks.all_max(torch.tensor(float(len(pieces)))))
            pieces += [[] for _ in range(num - len(pieces))]
        return pieces

    def _train(self, step: int, experience: Experience, minibatches: Sequence[MiniBatch], metrics: StepMetrics) -> int:
        """Run the optimiser steps until the policy has moved too far; returns the number done."""
        learning_rate = self._learning_rate(step)
        metrics.constant("learner/learning_rate", learning_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for num_done, minibatch in enumerate(minibatches):
            if not self._optimize(step, experience, minibatch, metrics):
                return num_done
        return len(minibatches)

    def _learning_rate(self, step: int) -> float:
        config, num_steps = self._config, length_at(step, self._lengths, self._config.num_steps)
        peak = config.learning_rate
        if peak is None:
            peak = default_learning_rate("ppo", self._num_parameters, lora=config.lora.rank > 0)
        return peak * schedule_of(config).factor(step, num_steps)

    def _scheduled(self, value: float, schedule: str, step: int) -> float:
        return scheduled(value, schedule, step, length_at(step, self._lengths, self._config.num_steps))

    def _optimize(self, step: int, experience: Experience, minibatch: MiniBatch, metrics: StepMetrics) -> bool:
        """Run one optimiser step.

        Returns false, without it, if the policy has moved too far since the step's start.
        """
        self._optimizer.zero_grad(set_to_none=True)
        batch, rows = experience.batch, minibatch.rows
        step_kl, bad = torch.zeros((), dtype=torch.float64, device=self._device), list[str]()
        for piece in self._pieces([batch.lengths[row] for row in rows]):
            kl, uids = self._accumulate(step, experience, [rows[index] for index in piece], minibatch, metrics)
            step_kl, bad = step_kl + kl, bad + uids
        parameters = self._trained(step)
        uids = [batch.uids[row] for row in rows]
        with self._ranks.agreed():
            if bad:
                raise LearnerError(_named(bad), "the loss is not finite", uids=bad)
            if self._ranks.size > 1 and not self._model.is_sharded:
                self._check_gradients(parameters, uids)
        if self._has_gone_too_far(step_kl, minibatch.num_tokens):
            return False
        self._ranks.sum_gradients(parameters)
        norm = self._check_gradients(parameters, uids)
        clip_gradients(parameters, norm, self._config.max_grad_norm)
        self._optimizer.step()
        metrics.constant("learner/grad_norm", float(norm))
        return True

    def _has_gone_too_far(self, step_kl: Tensor, num_tokens: float) -> bool:
        limit = self._config.max_step_kl_nats
        return limit is not None and float(self._ranks.all_sum(step_kl)) / num_tokens > limit

    def _trained(self, step: int) -> list[nn.Parameter]:
        """Return the parameters to train; in the critic's warm-up the policy's gradients are dropped."""
        warming_up = step <= self._config.critic_warmup_steps
        chosen = []
        for name, parameter in self._model.named_parameters():
            if warming_up and name.startswith("policy."):
                parameter.grad = None
            elif parameter.requires_grad:
                chosen.append(parameter)
        return chosen

    def _accumulate(
        self, step: int, experience: Experience, rows: list[int], minibatch: MiniBatch, metrics: StepMetrics
    ) -> tuple[Tensor, list[str]]:
        """Add the gradient of these rows' part of the loss.

        Returns the sum of their tokens' KL from the step's start, and the uids whose loss is not finite.
        """
        config, batch = self._config, experience.batch
        sequences, (token_ids, mask) = _piece(batch, rows, batch.token_ids, batch.mask)
        outputs = self._graph or Outputs(*self._computed(self._model, token_ids, mask, sequences))
        self._graph = None
        places = places_of(mask)
        per_token = self._value_loss(outputs, experience, rows, places, metrics)
        if step > config.critic_warmup_steps:
            per_token = per_token + self._policy_loss(step, outputs, experience, rows, places, metrics)
        loss = losses.aggregate(
            per_token,
            mask,
            config.loss_aggregation,
            num_tokens=minibatch.num_tokens,
            num_sequences=minibatch.num_sequences,
        )
        loss.backward()
        _, (proximal,) = _piece(batch, rows, experience.proximal)
        kl = at(places, adv.kl_k3(outputs.logprobs.detach(), proximal))
        bad = [] if torch.isfinite(loss) else _not_finite(batch, torch.where(mask, per_token, 0.0), rows)
        metrics.mean("learner/step_kl_nats_per_token", kl)
        return kl.sum(dtype=torch.float64), bad

    def _value_loss(
        self, outputs: Outputs, experience: Experience, rows: list[int], places: Tensor, metrics: StepMetrics
    ) -> Tensor:
        """Compute the weighted value loss of each token."""
        _, (old_values, returns) = _piece(experience.batch, rows, experience.values, experience.returns)
        value = losses.value_loss(outputs.values, old_values=old_values, returns=returns, clip=self._config.value_clip)
        metrics.mean("learner/value_loss", at(places, value.loss))
        metrics.mean("learner/value_clip_fraction", at(places, value.is_clipped))
        return self._config.value_coefficient * value.loss

    def _policy_loss(
        self, step: int, outputs: Outputs, experience: Experience, rows: list[int], places: Tensor, metrics: StepMetrics
    ) -> Tensor:
        """Compute the policy loss of each token, with importance weights, entropy bonus and KL penalty."""
        config, batch = self._config, experience.batch
        fields = (experience.anchor, experience.importance, experience.advantages, experience.reference)
        _, (mask, anchor, weights, advantages, reference) = _piece(batch, rows, batch.mask, *fields)
        policy = losses.policy_loss(
            outputs.logprobs,
            proximal_logprobs=anchor,
            advantages=advantages,
            mask=mask,
            clip=config.clip,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            objective=config.policy_objective,
        )
        per_token = policy.loss * weights
        metrics.mean("learner/policy_loss", at(places, per_token))
        metrics.mean("learner/clip_fraction", at(places, policy.is_clipped))
        metrics.mean("learner/ratio_mean", at(places, policy.ratio))
        metrics.max("learner/ratio_max", at(places, policy.ratio))
        if config.kl_in == "loss":
            penalty = adv.KL_ESTIMATORS[config.kl_estimator](outputs.logprobs, reference)
            per_token = per_token + self.computer.kl_coefficient * penalty
        if config.entropy_coefficient:
            weight = self._scheduled(config.entropy_coefficient, config.entropy_schedule, step)
            per_token = per_token - weight * outputs.entropy
        return per_token

    def _check_gradients(self, parameters: Sequence[nn.Parameter], uids: Sequence[str]) -> Tensor:
        """Return the gradients' global norm. Raises LearnerError naming the trajectories if it is not finite."""
        norm = gradient_norm(parameters)
        if not torch.isfinite(norm):
            raise LearnerError(_named(uids), f"the gradient is not finite (norm {float(norm)})", uids=uids)
        return norm


def _piece(batch: Batch, rows: list[int], *tensors: Tensor) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """Return the lengths of these rows' sequences, and their part of the tensors [B, T], cut to the longest row.

    Without rows, returns one row of two zero tokens: ranks that call the model together need an input.
    """
    if not rows:
        return [(2,)], [torch.zeros_like(tensor[:1, :2]) for tensor in tensors]
    sequences = [batch.sequences[row] for row in rows]
    width = max(batch.lengths[row] for row in rows)
    if rows == list(range(len(batch.lengths))):
        return sequences, [tensor[:, :width] for tensor in tensors]
    index = on_device(rows, tensors[0].device)
    return sequences, [tensor[index, :width] for tensor in tensors]


def _refuse_future(batch: Batch, step: int) -> None:
    for uid, versions in zip(batch.uids, batch.versions, strict=True):
        if int(versions.max()) > step - 1:
            problem = f"sampled by version {int(versions.max())}, step {step} starts from {step - 1}"
            raise LearnerError(f"trajectory {uid}", problem, uids=[uid])


def _not_finite(batch: Batch, per_token: Tensor, rows: Sequence[int]) -> list[str]:
    finite = torch.isfinite(per_token).all(1).tolist()
    return [batch.uids[row] for row, ok in zip(rows, finite, strict=True) if not ok]


def _check_finite(batch: Batch, per_token: Tensor, name: str) -> None:
    bad = _not_finite(batch, per_token, range(len(batch.uids)))
    if bad:
        raise LearnerError(_named(bad), f"{name} is not finite", uids=bad)


def _named(uids: Sequence[str]) -> str:
    more = f" and {len(uids) - MAX_NAMED} more" if len(uids) > MAX_NAMED else ""
    return f"trajectories {', '.join(uids[:MAX_NAMED])}{more}"
