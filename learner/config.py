"""The sections `[learner]`, `[sft]`, `[preferences]` and `[reward_model]`. Imports neither torch nor ray."""

from __future__ import annotations

import os
from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import Section


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685), in the place of training every weight."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0: none, every weight is trained."""
    alpha: float = Field(default=16.0, gt=0)
    """They are scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get one, such as q_proj; empty: all but the output layer."""


class ConstraintConfig(Section):
    """A bound on the mean cost of responses, which a Lagrange multiplier keeps: what is trained is reward less
    multiplier x cost, over 1 + multiplier."""

    cost: str | None = None
    """The part of the reward that is the cost, such as `safe/violation` of a composite that has the `forbidden` scorer
    `safe` among its parts (of weight 0 or more), or a number in the environment's `info`; unset: no bound."""
    max_mean: float = 0.01
    """The bound. Where a violation costs 1 and anything else 0, it is the share of responses that may violate."""
    learning_rate: float = Field(default=1.0, gt=0)
    """What the multiplier moves by after a step, in multiples of the step's mean cost less the bound; never below 0."""
    initial_multiplier: float = Field(default=1.0, ge=0)
    """The multiplier in the first step."""
    max_multiplier: float | None = Field(default=None, gt=0)
    """Where it stops rising, so that it is soon back where the bound could not be kept for a while."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.cost is None and changed:
            raise ValueError(f"cost: {changed[0]} is set, and nothing is named that is the cost")
        if self.max_multiplier is not None and self.max_multiplier < self.initial_multiplier:
            what = f"{self.max_multiplier:g} is less than initial_multiplier = {self.initial_multiplier:g}"
            raise ValueError(f"max_multiplier: {what}")
        return self


class LearnerConfig(Section):
    """PPO (Schulman et al. 2017, arXiv:1707.06347) with a KL penalty to the reference policy in the reward.

    How learners share out work and memory holds for supervised fine-tuning and the reward model as well.
    """

    num_learners: int = Field(default=1, ge=0)
    """Learner processes (ranks); 0 runs the learner inside the driver."""
    num_steps: int = Field(default=100, ge=1)
    """Steps: each takes one batch of groups and publishes one policy version. A higher number extends a run, done or
    not, from its last checkpoint; a linear schedule is from there on the one of the new number."""
    num_epochs: int = Field(default=2, ge=1)
    """Passes over the batch of a step."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimiser steps per pass; must divide the trajectories of a step."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """AdamW's learning rate at the first step."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """What becomes of it: nothing, or a straight line that would reach zero one step after the last."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Weight of the per-token KL to the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How that KL is estimated (Schulman 2020); the reported `kl_nats` is always k1, summed over a response."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether it is subtracted from the reward of every token or added to the loss (there k2 or k3)."""
    kl_target: float | None = Field(default=None, gt=0)
    """`kl_nats` that the coefficient is steered to (arXiv:1909.08593, section 2.2); unset, it stays as it is."""
    kl_horizon: float = Field(default=10_000.0, gt=0)
    """Episodes in which the steered coefficient may change by a fifth."""
    clip: float = Field(default=0.2, gt=0)
    """Half-width of the policy ratio's clip."""
    clip_high: float | None = Field(default=None, gt=0)
    """Its upper half where it differs ("clip-higher", arXiv:2503.14476): lets unlikely tokens rise further."""
    policy_objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    """What is clipped: each token's ratio, the whole response's (arXiv:2507.18071), or only its weight
    (arXiv:2506.13585), which leaves every token a gradient."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of a token's loss in multiples of its advantage where that is negative (arXiv:1912.09729, eq. 5)."""
    loss_aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"] = "token_mean"
    """What a mini-batch's loss is the mean of: all tokens, or all responses, each by its tokens' sum or mean."""
    value_clip: float = Field(default=0.2, gt=0)
    """Half-width of the value clip around the values of the batch."""
    value_coefficient: float = Field(default=0.5, ge=0)
    """Weight of the value loss."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    entropy_schedule: Literal["constant", "linear"] = "constant"
    """What becomes of that weight: nothing, or a straight line that would reach zero one step after the last."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation (arXiv:1506.02438)."""
    gae_value_lambda: float | None = Field(default=None, ge=0, le=1)
    """Lambda of the critic's returns where it differs (decoupled GAE, arXiv:2503.01491); 1 gives unbiased returns."""
    gae_lambda_alpha: float | None = Field(default=None, gt=0)
    """Makes lambda 1 - 1 / (alpha n) for a response of n tokens (arXiv:2504.05118), in the place of `gae_lambda`."""
    advantages: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "gae"
    """How rewards become advantages: `gae` by a critic; the others without one. Each response against those to the
    same prompt: `grpo` (arXiv:2402.03300), `dr_grpo` (arXiv:2503.20783), `rloo` (arXiv:2402.14740). Rewards to come
    against the batch's, REINFORCE++ (arXiv:2501.03262): `reinforce_pp`, or less the mean of those to the same prompt
    first, `reinforce_pp_baseline`."""
    whiten_advantages: bool | None = None
    """Scale advantages of the batch to mean 0 and variance 1; unset: with `gae` and REINFORCE++."""
    normalize_by: Literal["task", "batch"] = "task"
    """In a run of several tasks: whether advantages are whitened, and rewards normalised, within each task or over all
    of them, so that a task counts the more the larger its rewards are."""
    decoupled: bool = True
    """Stale tokens: the trust region is around the weights at the step's start and a weight proximal / behaviour
    policy corrects for the older ones (decoupled PPO); otherwise it is around the policy that sampled them."""
    importance_cap: float = Field(default=2.0, gt=0)
    """Upper bound of that weight."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether each token has its own weight or a response's tokens their product."""
    importance_outside: Literal["truncate", "mask"] = "truncate"
    """A weight above the bound becomes the bound, or (IcePop, arXiv:2510.18855) nothing is learnt from its token."""
    importance_floor: float = Field(default=0.0, ge=0)
    """With `mask`: nor from a token whose weight is below this."""
    critic: Literal["shared", "separate"] = "shared"
    """A value head on the policy's trunk, or a second model with a head of its own; with `advantages = "gae"`."""
    critic_from: Literal["policy", "reward_model"] = "policy"
    """What a separate critic starts as: the policy's trunk and a head of zeros, or the run's reward model."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """First steps, in which the critic alone is trained."""
    normalize_rewards: bool = False
    """Scores less their running mean, over their running deviation, of all steps so far."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Scores (normalised ones, where they are) are held within +- this."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the score of a response that was cut off at its length limit."""
    overlong_tokens: int | None = Field(default=None, ge=0)
    """Response length from which on it costs: up to `overlong_penalty` (DAPO's soft punishment, arXiv:2503.14476)."""
    overlong_buffer_tokens: int = Field(default=1, ge=1)
    """Tokens beyond `overlong_tokens` at which the whole penalty is reached."""
    overlong_penalty: float = Field(default=1.0, ge=0)
    """What is then subtracted from the score."""
    max_step_kl_nats: float | None = Field(default=None, gt=0)
    """KL per token from the step's start at which the step ends before its last optimiser step, and says so."""
    constraint: ConstraintConfig = ConstraintConfig()
    """A cost that must stay below a bound while the reward rises, such as forbidden words."""
    data_parallel: Literal["ddp", "fsdp2"] = "ddp"
    """Every learner holds the whole model (and gradients are summed), or a shard of each tensor."""
    packing: bool = True
    """Compute sequences end to end without padding; false: padded on the right."""
    micro_batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens that a learner computes at once; a mini-batch is as many such pieces as it takes."""
    logprob_chunk_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose distributions over the vocabulary are held at once; unset: as many as take 256 MiB."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what is inside it."""
    fused: bool = True
    """On a GPU: compile layers and distributions over tokens; the first step takes a minute longer, the others less.
    On a CPU nothing is compiled."""
    lora: LoraConfig = LoraConfig()
    """Train adapters alone; the reference is the model without them, and they are published merged."""
    num_cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray reserves for each learner."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for each learner."""
    num_threads: int = Field(default=0, ge=0)
    """Threads of torch on the CPU in each learner; 0: the machine's cores shared out among the learners, but for one
    in PPO, which is left to the engines. Another number may round sums differently."""
    step_timeout_s: float = Field(default=1800.0, gt=0)
    """Deadline of one learner step."""
    checkpoint_every_steps: int = Field(default=20, ge=1)
    """Steps between checkpoints."""
    max_restarts: int = Field(default=1, ge=0)
    """How many times in a run a dead or hung learner group is rebuilt from its last checkpoint; one inside the driver
    never is."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Besides the newest two checkpoints and the best, those of every so many steps are kept."""


def num_cores() -> int:
    """CPU cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
"""Those that compare the responses to one prompt."""


def critic_of(config: LearnerConfig) -> Literal["shared", "separate", "none"]:
    """The critic that these settings train."""
    return config.critic if config.advantages == "gae" else "none"


def learner_threads(config: LearnerConfig) -> int:
    """Threads of torch for a learner that runs on this machine."""
    return config.num_threads or max(1, (num_cores() - 1) // max(1, config.num_learners))


def stage_threads(config: LearnerConfig) -> int:
    """The same for the stages before PPO: no engine works beside them."""
    return config.num_threads or max(1, num_cores() // max(1, config.num_learners))


class SftConfig(Section):
    """Supervised fine-tuning on prompt-completion pairs; the loss is over the completion alone."""

    num_steps: int = Field(default=250, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=64, ge=1)
    """Examples an optimiser step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """AdamW's peak learning rate; linear warm-up over a tenth, then cosine to a tenth."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest example, prompt and completion together; unset: the model's context."""
    long_examples: Literal["error", "drop", "cut"] = "error"
    """What becomes of a longer one: an error, left out, or cut at its end; left out too where no token of the
    completion fits. The summary counts them."""
    held_out_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the examples kept from training for `held_out_loss`; with any, the weights of the lowest are kept."""
    evaluate_every_steps: int = Field(default=25, ge=1)
    """Optimiser steps between two measurements of `held_out_loss`; the last step is always measured."""
    patience: int | None = Field(default=None, ge=1)
    """Measurements without a lower `held_out_loss` after which training stops; unset: it goes on to its last step."""
    checkpoint_every_steps: int = Field(default=100, ge=1)
    """Optimiser steps between checkpoints, from the last of which an interrupted stage goes on."""

    @model_validator(mode="after")
    def _patience_needs_held_out_examples(self) -> Self:
        if self.patience is not None and not self.held_out_share:
            raise ValueError("patience needs a held_out_share to watch")
        return self


class PreferencesConfig(Section):
    """Pairs of responses of the SFT policy, labelled by an annotator."""

    num_pairs: int = Field(default=3000, ge=2)
    """Pairs sampled and labelled for training."""
    num_held_out_pairs: int = Field(default=1000, ge=0)
    """Fresh pairs beyond them, for the reported accuracy alone."""
    annotator: str | None = None
    """Dotted path of `f(prompts, first, second, *, seed) -> list[0 | 1]` (1: the second is better)."""
    oracle: str | None = None
    """Dotted path of `f(prompts, responses) -> list[float]`, a simulated annotator's true opinion: reports how many
    labels disagree with it (the noise ceiling); nothing is trained on it."""


class RewardModelConfig(Section):
    """Bradley-Terry training of a sequence classifier with one label."""

    num_epochs: int = Field(default=3, ge=1)
    """Passes over the pairs."""
    batch_size: int = Field(default=64, ge=1)
    """Pairs an optimiser step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW's peak learning rate; linear warm-up over a tenth, then cosine to a tenth."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels that are taken to be wrong: each pair is learnt the other way round with this weight."""
    num_members: int = Field(default=1, ge=1, le=16)
    """Reward models trained on the same pairs, each with its own new head and order of batches; the first one is
    served, the others lie in its folder (member-1, ...) and show where they disagree."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the pairs kept for the reported accuracy."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest prompt with its response; unset: the model's context."""
    long_examples: Literal["error", "drop", "cut"] = "error"
    """What becomes of a pair with a longer one: an error, left out, or its responses cut at their end; left out too
    where no token of them fits, or nothing is left to tell them apart. The summary counts them."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a lower `held_out_loss` after which training stops, and the weights of the lowest are kept;
    unset: it goes on to its last epoch, whose weights are kept."""
    checkpoint_every_steps: int = Field(default=100, ge=1)
    """Optimiser steps between checkpoints, from the last of which an interrupted stage goes on."""
