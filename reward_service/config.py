"""The `[reward_service]` section. Imports neither torch nor ray."""

from __future__ import annotations

from pydantic import Field, field_validator

from cluster.config import Section
from reward_service.composite_config import REWARD_MODEL as REWARD_MODEL
from reward_service.composite_config import CompositeConfig, check_composites
from reward_service.scorer_config import SCORER_NAME, ScorerConfig


def app_name(run_name: str) -> str:
    """The Ray Serve application of that run: runs that share a cluster have each their own."""
    return f"antiphon-{run_name}-rewards"


class RewardServiceConfig(Section):
    """What scores responses, and where it can be reached."""

    scorer: str = REWARD_MODEL
    """What a run uses: `reward_model` (its trained reward model), a name in `scorers`, or the dotted path of a function
    `f(prompts, responses, **columns) -> list[float]`."""
    scorers: dict[str, ScorerConfig] = Field(default_factory=dict)
    """Scorers by name: `[reward_service.scorers.NAME]` with a kind and its settings."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the service."""
    host: str = "127.0.0.1"
    """Address to bind when a port is set; beyond loopback a token (ANTIPHON_TOKEN) is required."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """HTTP port; without one the service is reached by handle alone."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of one scoring call."""
    max_batch_size: int = Field(default=256, ge=1)
    """Most responses scored in one forward pass of a reward model."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Most tokens, padding included, in one forward pass of a reward model; a longer text goes alone."""
    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs that Ray reserves for each replica."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for each replica."""

    @field_validator("scorers")
    @classmethod
    def _names(cls, scorers: dict[str, ScorerConfig]) -> dict[str, ScorerConfig]:
        for name in scorers:
            if not SCORER_NAME.fullmatch(name):
                raise ValueError(f"{name}: is no name: a letter, then letters, digits, '_', '.' and '-'")
            if name == REWARD_MODEL:
                raise ValueError(f"{name}: is the run's own reward model: take another name")
        check_composites(scorers)
        return scorers

    def needs_reward_model(self) -> bool:
        """Whether what a run uses, or a part of any scorer, is the run's trained reward model."""
        composites = [scorer for scorer in self.scorers.values() if isinstance(scorer, CompositeConfig)]
        return self.scorer == REWARD_MODEL or any(REWARD_MODEL in composite.members() for composite in composites)
