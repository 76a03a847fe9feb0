"""Define every metric that a run writes: its unit, display format and meaning.

A row of `metrics.jsonl` has the keys of one stage. `NAME` stands for a task and `N` for a number.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Metric(NamedTuple):
    """Unit, display format and meaning of a metric."""

    unit: str
    format: str
    help: str


_COUNT, _MEAN, _SHARE, _LOSS, _NATS = "{:,.0f}", "{:.3f}", "{:.1%}", "{:.4f}", "{:.2f} nats"
_SECONDS, _RATE = "{:.1f} s", "{:,.0f} tokens/s"

METRICS: dict[str, Metric] = {
    "step": Metric("", _COUNT, "Step of the stage."),
    "optimizer_step": Metric("", _COUNT, "Optimiser steps of PPO so far."),
    "policy_version": Metric("", _COUNT, "Version of the policy that the step published."),
    "time_s": Metric("s", _SECONDS, "Seconds since the PPO stage of this command began."),
    "num_episodes": Metric("responses", _COUNT, "Responses trained so far."),
    "learner/reward_mean": Metric("", _MEAN, "What scorer and environment gave, before any penalty."),
    "learner/reward_std": Metric("", _MEAN, "Standard deviation of that reward over the responses of the step."),
    "learner/zero_variance_share": Metric("share", _SHARE, "Groups whose responses all have the same reward."),
    "learner/shaped_reward_mean": Metric("", _MEAN, "The reward after normalisation, clipping and penalties."),
    "learner/kl_nats": Metric("nats", _NATS, "KL to the reference policy (k1): sum per response, mean."),
    "learner/kl_nats_per_token": Metric("nats", "{:.4f} nats", "KL to the reference policy (k1), mean over tokens."),
    "learner/kl_coefficient": Metric("", _LOSS, "Current weight of the KL penalty."),
    "learner/entropy_nats": Metric("nats", _NATS, "Mean entropy of the distributions over tokens."),
    "learner/policy_loss": Metric("", _LOSS, "Loss of the policy, mean over tokens."),
    "learner/value_loss": Metric("", _LOSS, "Loss of the critic, mean over tokens."),
    "learner/clip_fraction": Metric("share", _SHARE, "Tokens whose policy loss is clipped."),
    "learner/value_clip_fraction": Metric("share", _SHARE, "Tokens whose value loss is clipped."),
    "learner/ratio_mean": Metric("", _MEAN, "Probability of a token now, divided by that before the step: mean."),
    "learner/ratio_max": Metric("", _MEAN, "Probability of a token now, divided by that before the step: maximum."),
    "learner/step_kl_nats_per_token": Metric("nats", "{:.4f} nats", "KL (k3) from before the step to now."),
    "learner/explained_variance": Metric("share", _MEAN, "Share of the returns' variance that the critic explains."),
    "learner/learning_rate": Metric("", "{:.2e}", "Learning rate of the step."),
    "learner/grad_norm": Metric("", _MEAN, "Global norm of the gradient before it is clipped, mean of the step."),
    "learner/num_optimizer_steps": Metric("", _COUNT, "Optimiser steps in this step."),
    "learner/step_s": Metric("s", _SECONDS, "Duration of the learner's step."),
    "learner/cost_mean": Metric("", _MEAN, "Mean cost of the responses, with `learner.constraint`."),
    "learner/constraint_multiplier": Metric("", "{:.2f}", "Price of the cost, with `learner.constraint`."),
    "learner/importance_weight_mean": Metric("", _MEAN, "Mean of the weights that correct for policy lag."),
    "learner/effective_sample_size": Metric("share", _SHARE, "Effective sample size of those weights, of all tokens."),
    "learner/engine_logprob_difference_mean": Metric(
        "nats", "{:.2e} nats", "Difference of engine and learner on tokens of the newest version: mean."
    ),
    "learner/engine_logprob_difference_max": Metric(
        "nats", "{:.2e} nats", "Difference of engine and learner on tokens of the newest version: maximum."
    ),
    "learner/engine_kl_nats_per_token": Metric("nats", "{:.2e} nats", "KL (k3) between engine and learner, per token."),
    "learner/num_learner_restarts": Metric("", _COUNT, "Learner groups rebuilt in this run."),
    "rollout_actors/response_length_tokens": Metric("tokens", "{:.1f} tokens", "Mean length of the responses."),
    "rollout_actors/response_length_min_tokens": Metric("tokens", _COUNT, "Length of the shortest response."),
    "rollout_actors/response_length_max_tokens": Metric("tokens", _COUNT, "Length of the longest response."),
    "rollout_actors/cut_share": Metric("share", _SHARE, "Responses cut off at a limit of tokens or turns."),
    "rollout_actors/ended_share": Metric("share", _SHARE, "Responses that ended properly: all but those cut off."),
    "rollout_actors/tokens_per_s": Metric(
        "tokens/s", _RATE, "Tokens sampled by all actors since the previous step; the last rate if none were."
    ),
    "rollout_actors/num_actors": Metric("", _COUNT, "Rollout actors."),
    "rollout_actors/num_healthy": Metric("", _COUNT, "Rollout actors that answer their health checks."),
    "rollout_actors/num_sampled_tokens": Metric("tokens", _COUNT, "Tokens sampled by this command so far."),
    "rollout_actors/num_tokens_sampled_during_step": Metric(
        "tokens", _COUNT, "Tokens sampled while the learner trained this step."
    ),
    "rollout_actors/busy_s": Metric("s", _SECONDS, "Time in the steps of the engines, total of this command."),
    "rollout_actors/swap_s": Metric("s", _SECONDS, "Time in weight swaps, total of this command."),
    "rollout_actors/prefill_again_s": Metric(
        "s", _SECONDS, "Time in prefilling interrupted responses again after swaps, an upper bound of the total."
    ),
    "rollout_actors/num_swaps_proved": Metric("", _COUNT, "Weight swaps that the probe proved, total of this command."),
    "rollout_actors/num_swaps_checksum_only": Metric(
        "", _COUNT, "Weight swaps that only checksums confirm, total of this command."
    ),
    "reward_service/num_scorer_versions": Metric("", _COUNT, "Versions of scorers in the rewards of this step."),
    "cluster/policy_lag_mean": Metric("versions", "{:.2f}", "Age of the tokens of this step: mean."),
    "cluster/policy_lag_max": Metric("versions", _COUNT, "Age of the tokens of this step: maximum."),
    "cluster/policy_lag_share_N": Metric("share", _SHARE, "Tokens of this step that are N versions old."),
    "cluster/num_admitted": Metric("groups", _COUNT, "Groups admitted so far: trained, void or open."),
    "cluster/num_trained": Metric("groups", _COUNT, "Groups trained so far."),
    "cluster/num_void": Metric("groups", _COUNT, "Groups voided so far."),
    "cluster/num_resampled": Metric("groups", _COUNT, "Void groups that had equal rewards and were resampled, so far."),
    "cluster/num_open": Metric("groups", _COUNT, "Groups admitted and neither trained nor void."),
    "tasks/NAME/num_episodes": Metric("responses", _COUNT, "Responses of the task trained so far."),
    "tasks/NAME/reward_mean": Metric("", _MEAN, "What scorer and environment gave in the task."),
    "tasks/NAME/response_length_tokens": Metric("tokens", "{:.1f} tokens", "Mean length of the task's responses."),
    "tasks/NAME/kl_nats": Metric("nats", _NATS, "Held-out prompts of the task: KL to the reference policy."),
    "tasks/NAME/objective": Metric("", _MEAN, "Held-out prompts of the task: reward less the KL penalty."),
    "tasks/NAME/cost_mean": Metric("", _MEAN, "Held-out prompts of the task: mean cost."),
    "reward_mean": Metric("", _MEAN, "Held-out prompts: what scorer and environment gave."),
    "kl_nats": Metric(
        "nats",
        _NATS,
        "Held-out prompts: KL to the reference policy, summed per response. KTO: its estimate, at least 0.",
    ),
    "objective": Metric("", _MEAN, "Held-out prompts: reward_mean less kl_coefficient times kl_nats."),
    "cost_mean": Metric("", _MEAN, "Held-out prompts: mean cost, with `learner.constraint`."),
    "loss": Metric("", _LOSS, "Supervised stages: loss of the step's batch."),
    "accuracy": Metric(
        "share",
        _SHARE,
        "Reward model and DPO: pairs of the batch whose chosen response has the higher reward. KTO: responses whose "
        "reward is on the right side of the KL.",
    ),
    "held_out_loss": Metric("", _LOSS, "Supervised stages: loss on held-out examples."),
    "held_out_accuracy": Metric("share", _SHARE, "The same of held-out pairs or responses."),
    "held_out_margin": Metric("", _MEAN, "DPO: rewards/margins of held-out pairs or responses."),
    "rewards/chosen": Metric(
        "", _MEAN, "DPO: mean reward of chosen or desirable responses, beta times the log-ratio of policy to reference."
    ),
    "rewards/rejected": Metric("", _MEAN, "DPO: the same of rejected or undesirable responses."),
    "rewards/margins": Metric("", _MEAN, "DPO: rewards/chosen less rewards/rejected."),
    "logps/chosen": Metric("nats", _NATS, "DPO: log-probability of chosen or desirable responses, mean of their sums."),
    "logps/rejected": Metric("nats", _NATS, "DPO: the same of rejected or undesirable responses."),
    "tokens_per_s": Metric("tokens/s", _RATE, "Supervised fine-tuning: tokens trained per second."),
    "pairs_per_s": Metric("pairs/s", "{:,.0f} pairs/s", "Reward model and DPO: pairs trained per second."),
    "responses_per_s": Metric("responses/s", "{:,.0f} responses/s", "KTO: responses trained per second."),
}


def metric_of(key: str) -> Metric | None:
    """Return the entry of a key of `metrics.jsonl`, or None if the table has none."""
    if key in METRICS:
        return METRICS[key]
    name = re.sub(r"^tasks/.+/(?=[^/]+$)", "tasks/NAME/", key)
    return METRICS.get(re.sub(r"^(cluster/policy_lag_share_)\d+$", r"\1N", name))
