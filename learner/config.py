"""The sections `[learner]`, `[sft]`, `[preferences]` and `[reward_model]`. Imports neither torch nor ray."""

from __future__ import annotations

import os
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from cluster.config import Section, setting
from learner.dpo_config import DpoConfig
from learner.estimators import check_name, needs_of
from learner.learning_rates import Schedule, Shape


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685), trained instead of every weight."""

    rank: int = setting(0, may_change="never", ge=0)
    """Rank of the adapters; 0 trains every weight."""
    alpha: float = setting(16.0, may_change="never", gt=0)
    """Adapters are scaled by alpha / rank."""
    target_modules: tuple[str, ...] = setting((), may_change="never")
    """Names of the linear layers that get an adapter, such as q_proj; if empty, all but the output layer."""


class ConstraintConfig(Section):
    """A bound on the mean cost of responses, kept by a Lagrange multiplier: PPO trains (reward - multiplier x cost) /
    (1 + multiplier)."""

    cost: str | None = setting(None, may_change="never")
    """The part of the reward that is the cost, such as `safe/violation` of a composite with the `forbidden` scorer
    `safe` among its parts (of weight 0 or more), or a number in the environment's `info`. If unset, there is no
    constraint."""
    max_mean: float = setting(0.01, may_change="recorded")
    """Upper bound of the mean cost. If a violation costs 1 and anything else 0, it is the share of responses that may
    violate."""
    learning_rate: float = setting(1.0, may_change="recorded", gt=0)
    """Change of the multiplier after a step, as a multiple of (mean cost - max_mean); the multiplier is never
    negative."""
    initial_multiplier: float = setting(1.0, may_change="never", ge=0)
    """The multiplier in the first step."""
    max_multiplier: float | None = setting(None, may_change="recorded", gt=0)
    """Upper bound of the multiplier, so that it recovers quickly after a time in which the constraint could not be
    met."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.cost is None and changed:
            raise ValueError(f"cost: {changed[0]} is set, but no cost: name the part of the reward that is the cost")
        if self.max_multiplier is not None and self.max_multiplier < self.initial_multiplier:
            problem = f"{self.max_multiplier:g} is less than initial_multiplier = {self.initial_multiplier:g}"
            raise ValueError(f"max_multiplier: {problem}")
        return self


class LearnerConfig(Section):
    """PPO (Schulman et al. 2017, arXiv:1707.06347) with a KL penalty to the reference policy.

    Settings of parallelism and memory apply to supervised fine-tuning and the reward model as well.
    """

    num_learners: int = setting(1, may_change="never", ge=0)
    """Learner processes (ranks); 0 runs the learner inside the driver."""
    num_steps: int = setting(100, may_change="higher", ge=1)
    """Steps: each takes one batch of groups and publishes one policy version. A higher number extends a run, finished
    or not, from its last checkpoint; linear schedules follow the new number from there on."""
    num_epochs: int = setting(2, may_change="recorded", ge=1)
    """Passes over the batch of a step."""
    num_minibatches: int = setting(1, may_change="recorded", ge=1)
    """Optimiser steps per pass; must divide the trajectories of a step."""
    learning_rate: float | None = setting(None, may_change="recorded", gt=0)
    """AdamW's peak learning rate. If unset: 1e-6 for a model of a billion parameters, and inversely proportional to the
    root of the model's size; ten times as much with adapters. The run prints it."""
    learning_rate_schedule: Shape = setting("constant", may_change="recorded")
    """After the warm-up, keep the learning rate constant, or decrease it linearly or as a half cosine so that it would
    reach `final_learning_rate_share` of the peak one step after the last."""
    warmup_share: float = setting(0.0, may_change="recorded", ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly to its peak."""
    final_learning_rate_share: float = setting(0.0, may_change="recorded", ge=0, le=1)
    """What a linear or cosine schedule ends at, as a share of the peak."""
    weight_decay: float = setting(0.0, may_change="recorded", ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = setting(1.0, may_change="recorded", gt=0)
    """Gradients are clipped to this global norm."""
    kl_coefficient: float = setting(0.05, may_change="recorded", ge=0)
    """Weight of the per-token KL to the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k1", may_change="recorded")
    """Estimator of that KL (Schulman 2020). The reported `kl_nats` is always k1, summed over a response."""
    kl_in: Literal["reward", "loss"] = setting("reward", may_change="recorded")
    """Subtract the KL from the reward of every token, or add it to the loss (then k2 or k3)."""
    kl_target: float | None = setting(None, may_change="recorded", gt=0)
    """Target of `kl_nats` for an adaptive KL coefficient (arXiv:1909.08593, section 2.2). If unset, the coefficient is
    constant."""
    kl_horizon: float = setting(10_000.0, may_change="recorded", gt=0)
    """Episodes in which the adaptive coefficient may change by a fifth."""
    clip: float = setting(0.2, may_change="recorded", gt=0)
    """Half-width of the policy ratio's clip."""
    clip_high: float | None = setting(None, may_change="recorded", gt=0)
    """Upper half of the clip, if it differs ("clip-higher", arXiv:2503.14476): lets unlikely tokens rise further."""
    policy_objective: Literal["ppo", "gspo", "cispo"] = setting("ppo", may_change="recorded")
    """What is clipped: each token's ratio (`ppo`), the whole response's (`gspo`, arXiv:2507.18071), or only its weight
    (`cispo`, arXiv:2506.13585), which leaves every token a gradient."""
    dual_clip: float | None = setting(None, may_change="recorded", gt=1)
    """Upper bound of a token's loss as a multiple of its advantage, if the advantage is negative (arXiv:1912.09729, eq.
    5)."""
    loss_aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"] = setting(
        "token_mean", may_change="recorded"
    )
    """The loss of a mini-batch: the mean over all tokens, or over all responses, each with the sum or mean of its
    tokens."""
    value_clip: float = setting(0.2, may_change="recorded", gt=0)
    """Half-width of the value clip around the values of the batch."""
    value_coefficient: float = setting(0.5, may_change="recorded", ge=0)
    """Weight of the value loss."""
    entropy_coefficient: float = setting(0.0, may_change="recorded", ge=0)
    """Weight of the entropy bonus."""
    entropy_schedule: Literal["constant", "linear"] = setting("constant", may_change="recorded")
    """Keep the weight of the entropy bonus constant, or decrease it linearly so that it would reach zero one step after
    the last."""
    gamma: float = setting(1.0, may_change="recorded", ge=0, le=1)
    """Discount per token."""
    gae_lambda: float = setting(0.95, may_change="recorded", ge=0, le=1)
    """Lambda of generalised advantage estimation (arXiv:1506.02438)."""
    gae_value_lambda: float | None = setting(None, may_change="recorded", ge=0, le=1)
    """Lambda of the critic's returns, if it differs (decoupled GAE, arXiv:2503.01491); 1 gives unbiased returns."""
    gae_lambda_alpha: float | None = setting(None, may_change="recorded", gt=0)
    """Replaces `gae_lambda` by 1 - 1 / (alpha n) for a response of n tokens (arXiv:2504.05118)."""
    advantages: Annotated[str, AfterValidator(check_name)] = setting("gae", may_change="never")
    """Advantage estimator. `gae` uses a critic (arXiv:1506.02438). These compare the responses to a prompt: `grpo`
    (arXiv:2402.03300), `dr_grpo` (arXiv:2503.20783), `rloo` (arXiv:2402.14740). REINFORCE++ (arXiv:2501.03262) uses
    the discounted rewards, `reinforce_pp`, or these less the mean reward of the prompt, `reinforce_pp_baseline`. Or
    the dotted path of your own function of `learner.ppo.advantages.Signals`, which returns advantages [B, T]."""
    zero_variance_groups: Literal["train", "skip", "resample"] = setting("train", may_change="recorded")
    """What to do with a prompt whose responses all have the same reward, from which an estimator that compares them
    learns nothing: `train` on it, which leaves penalties and the critic's loss; `skip` it in the loss; or `resample`:
    replace it by another prompt before the step (DAPO's dynamic sampling, arXiv:2503.14476). Replaced groups count as
    void, with this reason, but not for `trajectory_queue.max_void_share`."""
    max_group_resamples: int = setting(10, may_change="always", ge=1)
    """With `resample`: how often a group of a step is replaced; after that it is trained as it is."""
    whiten_advantages: bool | None = setting(None, may_change="recorded")
    """Scale the advantages of the batch to mean 0 and variance 1. If unset: with `gae` and REINFORCE++."""
    normalize_by: Literal["task", "batch"] = setting("task", may_change="never")
    """In a run of several tasks: whiten advantages and normalise rewards within each task, or over all tasks, so that a
    task with larger rewards counts more."""
    decoupled: bool = setting(True, may_change="recorded")
    """For stale tokens, use decoupled PPO: the trust region is around the weights at the step's start, and importance
    weights proximal / behaviour policy correct for the lag. If false, the trust region is around the policy that
    sampled the tokens."""
    importance_cap: float = setting(2.0, may_change="recorded", gt=0)
    """Upper bound of the importance weights."""
    importance_level: Literal["token", "sequence"] = setting("token", may_change="recorded")
    """Whether each token has its own importance weight, or all tokens of a response have their product."""
    importance_outside: Literal["truncate", "mask"] = setting("truncate", may_change="recorded")
    """Truncate a weight above the cap to the cap, or mask its token in the loss (IcePop, arXiv:2510.18855)."""
    importance_floor: float = setting(0.0, may_change="recorded", ge=0)
    """With `mask`: mask tokens whose weight is below this as well."""
    critic: Literal["shared", "separate"] = setting("shared", may_change="never")
    """A value head on the policy's trunk, or a separate model with its own value head; used with `advantages =
    "gae"`."""
    critic_from: Literal["policy", "reward_model"] = setting("policy", may_change="never")
    """Initial weights of a separate critic: the policy's trunk with a head of zeros, or the run's reward model."""
    critic_warmup_steps: int = setting(0, may_change="recorded", ge=0)
    """First steps, in which only the critic is trained."""
    normalize_rewards: bool = setting(False, may_change="recorded")
    """Subtract the running mean from scores and divide by the running deviation, over all steps so far."""
    reward_clip: float | None = setting(None, may_change="recorded", gt=0)
    """Clip scores, after normalisation if any, to +- this."""
    missing_eos_penalty: float = setting(0.0, may_change="recorded", ge=0)
    """Subtracted from the score of a response that was cut off at its length limit."""
    overlong_tokens: int | None = setting(None, may_change="recorded", ge=0)
    """Response length above which a penalty applies, up to `overlong_penalty` (DAPO's soft punishment,
    arXiv:2503.14476)."""
    overlong_buffer_tokens: int = setting(1, may_change="recorded", ge=1)
    """Tokens beyond `overlong_tokens` at which the full penalty applies."""
    overlong_penalty: float = setting(1.0, may_change="recorded", ge=0)
    """The full penalty."""
    max_step_kl_nats: float | None = setting(None, may_change="recorded", gt=0)
    """KL per token from the start of the step above which the step ends early; a note reports it."""
    constraint: ConstraintConfig = ConstraintConfig()
    """A cost that must stay below a bound while the reward rises, such as forbidden words."""
    data_parallel: Literal["ddp", "fsdp2"] = setting("ddp", may_change="never")
    """Every learner holds the whole model and gradients are summed (`ddp`), or a shard of each tensor (`fsdp2`)."""
    packing: bool = setting(True, may_change="never")
    """Compute sequences end to end without padding. If false, pad them on the right."""
    micro_batch_tokens: int = setting(16_384, may_change="always", ge=1)
    """Maximum tokens in one forward pass of a learner; a mini-batch is split into as many passes as needed."""
    logprob_chunk_tokens: int | None = setting(None, may_change="always", ge=1)
    """Tokens whose distributions over the vocabulary are in memory at once. If unset: as many as take 256 MiB."""
    activation_checkpointing: bool = setting(False, may_change="always")
    """Recompute each layer in the backward pass instead of keeping its activations."""
    fused: bool = setting(True, may_change="always")
    """On a GPU, compile layers and distributions over tokens; the first step takes a minute longer, later ones less.
    Has no effect on a CPU."""
    weight_carrier: str = setting("object_store", may_change="always")
    """How published weights travel to the rollout actors: `object_store` (Ray's), or the dotted path of a class of your
    own with `put` and `fetch`, such as `my_task.carriers:Mine`."""
    lora: LoraConfig = LoraConfig()
    """PPO trains adapters only; the supervised stages train every weight. The reference is the model without adapters;
    published weights have them merged."""
    num_cpus: float = setting(0.5, may_change="always", ge=0)
    """CPUs that Ray reserves for each learner."""
    num_gpus: float = setting(0.0, may_change="always", ge=0)
    """GPUs that Ray reserves for each learner."""
    num_threads: int = setting(0, may_change="always", ge=0)
    """Torch threads on the CPU in each learner. 0 divides the machine's cores among the learners; PPO leaves one core
    to the engines. Another number may round sums differently."""
    step_timeout_s: float = setting(1800.0, may_change="always", gt=0)
    """Deadline of one learner step."""
    checkpoint_every_steps: int = setting(20, may_change="always", ge=1)
    """Steps between checkpoints."""
    max_restarts: int = setting(1, may_change="always", ge=0)
    """How many times in a run a dead or hung learner group is restarted from its last checkpoint; a learner inside the
    driver is never restarted."""
    keep_every_steps: int | None = setting(None, may_change="always", ge=1)
    """Keep the checkpoints of every so many steps, besides the newest two and the best."""


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def critic_of(config: LearnerConfig) -> Literal["shared", "separate", "none"]:
    """Return the critic that these settings train. Imports an estimator of the user's own."""
    return config.critic if needs_of(config.advantages).critic else "none"


def learner_threads(config: LearnerConfig) -> int:
    """Return the number of torch threads for a PPO learner on this machine."""
    return config.num_threads or max(1, (num_cores() - 1) // max(1, config.num_learners))


def stage_threads(config: LearnerConfig) -> int:
    """Return the number of torch threads for a learner of the supervised stages, which share no cores with engines."""
    return config.num_threads or max(1, num_cores() // max(1, config.num_learners))


def schedule_of(config: LearnerConfig | SftConfig | RewardModelConfig | DpoConfig) -> Schedule:
    """Return the learning-rate schedule of these settings."""
    return Schedule(config.learning_rate_schedule, config.warmup_share, config.final_learning_rate_share)


def num_supervised_steps(config: SftConfig | RewardModelConfig | DpoConfig, num_examples: int) -> int:
    """Return the optimiser steps on so many training examples: the number that is set, or that of the epochs."""
    return config.num_steps or config.num_epochs * -(-num_examples // config.batch_size)


class SftConfig(Section):
    """Supervised fine-tuning on prompt-completion pairs or conversations; the loss is over the model's turns only."""

    train_on: Literal["assistant", "last"] = setting("assistant", may_change="never")
    """Of a column `messages`, train every turn of the assistant with its tool calls, or only the last one."""
    num_epochs: int = setting(3, may_change="never", ge=1)
    """Passes over the examples."""
    num_steps: int | None = setting(None, may_change="never", ge=1)
    """Optimiser steps, instead of `num_epochs`."""
    batch_size: int = setting(64, may_change="never", ge=1)
    """Examples per optimiser step."""
    learning_rate: float | None = setting(None, may_change="never", gt=0)
    """AdamW's peak learning rate. If unset: 2e-5 for a model of a billion parameters, and inversely proportional to the
    root of the model's size. The run prints it."""
    learning_rate_schedule: Shape = setting("cosine", may_change="never")
    """After the warm-up, keep the learning rate constant, or decrease it linearly or as a half cosine to
    `final_learning_rate_share` of the peak."""
    warmup_share: float = setting(0.1, may_change="never", ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly to its peak."""
    final_learning_rate_share: float = setting(0.1, may_change="never", ge=0, le=1)
    """What a linear or cosine schedule ends at, as a share of the peak."""
    max_tokens: int | None = setting(None, may_change="never", ge=2)
    """Maximum tokens of an example, prompt and completion together. If unset: the model's context."""
    long_examples: Literal["error", "drop", "cut"] = setting("error", may_change="never")
    """What to do with a longer example: end with an error, drop it, or cut its end. It is dropped too if no token of
    the completion fits. The summary counts them."""
    held_out_share: float = setting(0.0, may_change="never", ge=0, lt=1)
    """Share of the examples held out from training for `held_out_loss`. If above 0, the weights with the lowest loss
    are kept."""
    evaluate_every_steps: int = setting(25, may_change="never", ge=1)
    """Optimiser steps between measurements of `held_out_loss`; the last step is always measured."""
    patience: int | None = setting(None, may_change="never", ge=1)
    """Measurements without a lower `held_out_loss` after which training stops. If unset, every step is done."""
    checkpoint_every_steps: int = setting(100, may_change="always", ge=1)
    """Optimiser steps between checkpoints, from the last of which an interrupted stage resumes."""

    @model_validator(mode="after")
    def _patience_needs_held_out_examples(self) -> Self:
        if self.patience is not None and not self.held_out_share:
            raise ValueError("patience: needs a held_out_share above 0, whose loss it watches")
        return self


class PreferencesConfig(Section):
    """Pairs of responses of the SFT policy, labelled by an annotator."""

    num_pairs: int = setting(3000, may_change="never", ge=2)
    """Pairs sampled and labelled for training."""
    num_held_out_pairs: int = setting(1000, may_change="never", ge=0)
    """Additional pairs, used only for the reported accuracy."""
    annotator: str | None = setting(None, may_change="never")
    """Dotted path of `f(prompts, first, second, *, seed) -> list[0 | 1]` (1: the second is better)."""
    oracle: str | None = setting(None, may_change="never")
    """Dotted path of `f(prompts, responses) -> list[float]`, a simulated annotator's true opinion. Used only to report
    how many labels disagree with it (the noise ceiling)."""


class RewardModelConfig(Section):
    """Bradley-Terry training of a sequence classifier with one label."""

    num_epochs: int = setting(3, may_change="never", ge=1)
    """Passes over the pairs."""
    num_steps: int | None = setting(None, may_change="never", ge=1)
    """Optimiser steps, instead of `num_epochs`."""
    batch_size: int = setting(64, may_change="never", ge=1)
    """Pairs per optimiser step."""
    learning_rate: float | None = setting(None, may_change="never", gt=0)
    """AdamW's peak learning rate. If unset: 1e-5 for a model of a billion parameters, and inversely proportional to the
    root of the model's size. The run prints it."""
    learning_rate_schedule: Shape = setting("cosine", may_change="never")
    """After the warm-up, keep the learning rate constant, or decrease it linearly or as a half cosine to
    `final_learning_rate_share` of the peak."""
    warmup_share: float = setting(0.1, may_change="never", ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly to its peak."""
    final_learning_rate_share: float = setting(0.1, may_change="never", ge=0, le=1)
    """What a linear or cosine schedule ends at, as a share of the peak."""
    label_smoothing: float = setting(0.0, may_change="never", ge=0, lt=0.5)
    """Share of labels assumed to be wrong: each pair is also learnt the other way round with this weight."""
    num_members: int = setting(1, may_change="never", ge=1, le=16)
    """Reward models trained on the same pairs, each with its own head and order of batches. The first is served; the
    others are in its folder (member-1, ...) and show where they disagree."""
    held_out_share: float = setting(0.1, may_change="never", gt=0, lt=1)
    """Share of the pairs held out for the reported accuracy."""
    max_tokens: int | None = setting(None, may_change="never", ge=2)
    """Maximum tokens of a prompt with its response. If unset: the model's context."""
    long_examples: Literal["error", "drop", "cut"] = setting("error", may_change="never")
    """What to do with a longer pair: end with an error, drop it, or cut the end of its responses. It is dropped too if
    no token of them fits, or if what remains is equal. The summary counts them."""
    patience: int | None = setting(None, may_change="never", ge=1)
    """Epochs without a lower `held_out_loss` after which training stops and the weights with the lowest loss are kept.
    If unset, every epoch is done and the last weights are kept."""
    checkpoint_every_steps: int = setting(100, may_change="always", ge=1)
    """Optimiser steps between checkpoints, from the last of which an interrupted stage resumes."""
