"""The `[reward_service]` section. Imports neither torch nor ray."""

from __future__ import annotations

from pydantic import Field

from cluster.config import Section

REWARD_MODEL = "reward_model"


def app_name(run_name: str) -> str:
    """The Ray Serve application of that run: runs that share a cluster have each their own."""
    return f"antiphon-{run_name}-rewards"


class RewardServiceConfig(Section):
    """What scores responses, and where it can be reached."""

    scorer: str = REWARD_MODEL
    """`reward_model` (the run's trained reward model) or the dotted path of a function
    `f(prompts, responses, **columns) -> list[float]`."""
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
    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs that Ray reserves for each replica."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for each replica."""
