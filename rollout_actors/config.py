"""The `[rollout_actors]` section. Imports neither torch, ray nor vllm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, field_validator

from cluster.config import MayChange, Section, setting
from cluster.registry import Registry

ADAPTERS: Registry[Callable[..., Any]] = Registry("environment adapter")
"""Adapters for environments of other packages, by the short names that `environment.path` accepts."""
ADAPTERS.register_path("gymnasium", "rollout_actors.adapters.gymnasium:GymnasiumText")
ADAPTERS.register_path("openenv", "rollout_actors.adapters.openenv:OpenEnvText")
ADAPTERS.register_path("verifiers", "rollout_actors.adapters.verifiers:VerifiersText")
RENAMED = {
    "rollout_actors.gymnasium_text:GymnasiumText": "gymnasium",
    "rollout_actors.openenv_text:OpenEnvText": "openenv",
    "rollout_actors.verifiers_text:VerifiersText": "verifiers",
}
"""Dotted paths of earlier versions, and the short names that replace them."""

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
ENGINE_MEMORY: dict[str, MayChange] = dict.fromkeys(
    (
        "block_size",
        "cpu_offload_gb",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "swap_space",
    ),
    "always",
)
"""vLLM's arguments that only change how the engine uses memory."""


class EnvironmentConfig(Section):
    """Environment of a multi-turn task. Without one, each prompt gets one response."""

    path: str | None = setting(None, may_change="never")
    """Dotted path of a class, or of a function that returns an environment: an object with Gymnasium's `reset(*, seed)`
    and `step(response)`, in texts or messages. Or the name of an adapter: `gymnasium`, `openenv` or `verifiers`."""
    settings: dict[str, Any] = setting({}, may_change="recorded", reevaluates=True)
    """Keyword arguments for the environment's constructor."""
    history: Literal["as_sampled", "as_rendered"] = setting("as_sampled", may_change="never")
    """What the policy sees of earlier turns. `as_sampled` keeps the sampled tokens: a conversation is one sequence.
    `as_rendered` has the chat template write all messages anew before every turn, as inference servers do (templates of
    reasoning models leave out earlier thoughts): every turn is a sequence of its own, trained with the rewards of its
    conversation."""
    tool_parser: str | None = setting(None, may_change="recorded", reevaluates=True)
    """vLLM's parser of tool calls, such as `hermes`, `llama3_json`, `mistral` or `openai` (gpt-oss). By default, the
    one that fits the chat template. With `none`, no function is called and the environment gets every response."""
    reasoning_parser: str | None = setting(None, may_change="recorded", reevaluates=True)
    """vLLM's parser of thoughts, such as `deepseek_r1`, in which tool calls are not executed. By default, the one that
    fits the chat template; with `none`, thoughts are those between `<think>` and `</think>`."""
    max_turns: int = setting(8, may_change="recorded", reevaluates=True, ge=1)
    """Maximum responses of the policy in a conversation."""
    max_tokens: int = setting(1024, may_change="recorded", reevaluates=True, ge=2)
    """Maximum tokens of a conversation, including the prompt and the environment's messages."""
    step_timeout_s: float = setting(30.0, may_change="always", gt=0)
    """Deadline of a `reset` or `step`; a group whose environment takes longer is voided."""
    own_process: bool = setting(False, may_change="always")
    """Run each environment in a separate process. Use it if environments are heavy or may hang or crash."""

    @field_validator("path")
    @classmethod
    def _refuse_renamed(cls, path: str | None) -> str | None:
        if path in RENAMED:
            raise ValueError(f'{path} has been renamed; write path = "{RENAMED[path]}"')
        return path


class RolloutActorsConfig(Section):
    """How many actors sample, and how."""

    num_actors: int = setting(1, may_change="always", ge=1)
    """Rollout actors at the start; `antiphon scale` changes the number during the run."""
    max_actors: int | None = setting(None, may_change="always", ge=1)
    """Enables autoscaling up to this many actors: one is added while the learner waits for groups, one is removed while
    it never waits, down to num_actors. `antiphon scale` turns autoscaling off."""
    responses_per_prompt: int = setting(4, may_change="never", ge=1)
    """Responses sampled for each prompt: the size of a group."""
    max_prompt_tokens: int = setting(512, may_change="never", ge=1)
    """Maximum tokens of a prompt."""
    long_prompts: Literal["error", "drop"] = setting("error", may_change="never")
    """What to do with a longer prompt: end with an error, or drop it. The summary counts dropped prompts."""
    max_response_tokens: int = setting(512, may_change="recorded", reevaluates=True, ge=1)
    """Maximum tokens of a response; a longer one is cut and finishes with reason `length`."""
    max_segment_tokens: int = setting(1024, may_change="always", ge=1)
    """Segment length. Finished segments are saved, so an actor's death loses at most this many tokens of a response;
    the next segment starts with a prefill of everything before it."""
    keep_special_tokens: bool | tuple[str, ...] = setting(True, may_change="recorded", reevaluates=True)
    """Special tokens that stay in a response's text for scorers, tools and environments. By default all that carry
    meaning (thoughts, tool marks, channels, unknown tokens): only the tokenizer's beginning, end and padding tokens and
    the model's stop tokens are left out. A list names the ones to keep; false keeps none."""
    temperature: float = setting(1.0, may_change="recorded", reevaluates=True, gt=0)
    """Sampling temperature; the learner computes log-probabilities at the same temperature."""
    top_p: float = setting(1.0, may_change="recorded", reevaluates=True, gt=0, le=1)
    """Sample from the likeliest tokens only, whose probabilities sum to this. PPO refuses it, because the learner would
    have to know which tokens were kept at each step; preferences, evaluation and chat take it."""
    top_k: int = setting(0, may_change="recorded", reevaluates=True, ge=0)
    """Sample from so many of the likeliest tokens, 0: from all. As `top_p`, not for PPO."""
    min_p: float = setting(0.0, may_change="recorded", reevaluates=True, ge=0, lt=1)
    """Sample only tokens that are at least this share as likely as the likeliest. As `top_p`, not for PPO."""
    stop: tuple[NonEmpty, ...] = setting((), may_change="recorded", reevaluates=True)
    """Texts that end a response. The tokens stay as sampled, so their log-probabilities are exact; the text for scorers
    and environments ends before the stop text."""
    kv_after_swap: Literal["recompute"] = setting("recompute", may_change="recorded")
    """What happens to active responses at a weight swap: they continue from prompt + partial response, prefilled again
    under the new weights."""
    num_concurrent_groups: int = setting(16, may_change="always", ge=1)
    """Groups that an actor samples concurrently. It prefetches half as many more."""
    num_cpus: float = setting(0.25, may_change="always", ge=0)
    """CPUs that Ray reserves for each actor."""
    num_gpus: float = setting(0.0, may_change="always", ge=0)
    """GPUs that Ray reserves for each actor."""
    max_restarts: int = setting(4, may_change="always", ge=0)
    """How many failed actors are replaced within an hour; one more ends the run."""
    probe_timeout_s: float = setting(60.0, may_change="always", gt=0)
    """Maximum time between two steps of an actor's engine; an actor that exceeds it twice in a row is replaced."""
    start_timeout_s: float = setting(300.0, may_change="always", gt=0)
    """How long an actor may take to start its engine."""
    engine: dict[str, Any] = setting({}, may_change="recorded", keys=ENGINE_MEMORY)
    """vLLM's own engine arguments, passed on by name."""


def max_sequence_tokens(actors: RolloutActorsConfig, environments: Iterable[EnvironmentConfig]) -> int:
    """Return the maximum tokens of a sampled sequence: a prompt with its response, or a whole conversation.

    `environments` has one entry for each task, with an empty `path` for a task without an environment.
    """
    plain = actors.max_prompt_tokens + actors.max_response_tokens
    longest = (plain if environment.path is None else environment.max_tokens for environment in environments)
    return max(longest, default=plain)
