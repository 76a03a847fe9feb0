"""The `[rollout_actors]` section. Imports neither torch, ray nor vllm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from cluster.config import Section


class EnvironmentConfig(Section):
    """Whom the policy talks with, turn by turn; without one, every prompt is answered once."""

    path: str | None = None
    """Dotted path of a class, or of a function that makes an environment: an object with `reset(*, seed)` and
    `step(response)`, as Gymnasium means them, in texts or messages."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What it is made with, as keyword arguments."""
    max_turns: int = Field(default=8, ge=1)
    """Most responses of the policy in a conversation."""
    max_tokens: int = Field(default=1024, ge=2)
    """Most tokens of a conversation, the prompt and what others say included."""
    step_timeout_s: float = Field(default=30.0, gt=0)
    """How long a `reset` or `step` may take; a group whose environment takes longer is voided."""
    own_process: bool = False
    """Have every environment in a process of its own: for heavy ones, and for such as may hang or crash."""


class RolloutActorsConfig(Section):
    """How many actors sample, and how."""

    num_actors: int = Field(default=1, ge=1)
    """Rollout actors at the start; `antiphon scale` changes it while the run goes on."""
    max_actors: int | None = Field(default=None, ge=1)
    """Where it is set, actors join while the learner waits for groups, up to this many, and leave while it never does,
    down to num_actors; `antiphon scale` ends that."""
    responses_per_prompt: int = Field(default=4, ge=1)
    """Responses sampled for each prompt: the size of a group."""
    max_prompt_tokens: int = Field(default=512, ge=1)
    """Longest prompt."""
    long_prompts: Literal["error", "drop"] = "error"
    """What becomes of a longer one: an error, or it is left out. The summary counts those left out."""
    max_response_tokens: int = Field(default=512, ge=1)
    """Longest response; a longer one is cut and finishes with reason `length`."""
    max_segment_tokens: int = Field(default=1024, ge=1)
    """Tokens after which a segment is closed and kept, so that the death of an actor costs a response no more than
    that; the next one is prefilled with what stands before it."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature, also the one trained at."""
    kv_after_swap: Literal["recompute"] = "recompute"
    """What happens to responses under way at a weight swap: they go on from prompt + partial response, prefilled
    again under the new weights."""
    num_concurrent_groups: int = Field(default=16, ge=1)
    """Groups an actor samples at once; half as many more wait in it for a place."""
    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs that Ray reserves for each actor."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for each actor."""
    max_restarts: int = Field(default=4, ge=0)
    """How often in an hour a failed actor is replaced before the run ends."""
    probe_timeout_s: float = Field(default=60.0, gt=0)
    """How long an actor's engine may take to come round from one step to the next; one that takes longer twice in a
    row is replaced."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """How long an actor may take to start its engine."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's own engine arguments, passed through by name."""


def max_sequence_tokens(actors: RolloutActorsConfig, environments: Iterable[EnvironmentConfig]) -> int:
    """The longest sequence that is sampled: a prompt with its response, or a whole conversation.

    `environments` are those of all tasks, that of a task without one among them.
    """
    plain = actors.max_prompt_tokens + actors.max_response_tokens
    longest = (plain if environment.path is None else environment.max_tokens for environment in environments)
    return max(longest, default=plain)
