"""The `[reward_service]` section. Imports neither torch nor ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from cluster.config import Section
from reward_service.config.composite import REWARD_MODEL as REWARD_MODEL
from reward_service.config.composite import CompositeConfig, check_composites
from reward_service.config.scorers import SCORER_NAME, FunctionConfig, ScorerConfig

MIN_TIMEOUT_S = 0.1
"""Shortest deadline of a call: what is shorter can only fail."""


NO_SCORER = "none"
"""Where the environment gives all the rewards there are."""


def app_name(run_name: str) -> str:
    """The Ray Serve application of that run: runs that share a cluster have each their own."""
    return f"antiphon-{run_name}-rewards"


class HttpConfig(Section):
    """Limits of the HTTP face: what it takes in, how long it waits, who may call."""

    tokens: Path | None = None
    """File of named bearer tokens, written by `antiphon token`; ANTIPHON_TOKEN is one more."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    """Longest body of a request; a longer one is refused while it is read."""
    max_buffered_bytes: int = Field(default=64 * 2**20, ge=1)
    """Most bytes of bodies held at once, over all requests."""
    max_waiting_requests: int = Field(default=512, ge=1)
    """Most requests under way at once; further ones are refused and told when to come again."""
    max_connections: int = Field(default=2048, ge=1)
    """Most connections open at once."""
    header_timeout_s: float = Field(default=10.0, gt=0)
    """How long a client may take to send the head of a request, and for a TLS handshake."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """How long a client may take to send the body of a request."""
    write_timeout_s: float = Field(default=30.0, gt=0)
    """How long a client may leave an answer unread."""
    require_token: bool = False
    """Ask for a token though there is none yet; beyond loopback, and where there is one, it is asked for anyway."""
    ssl_certfile: Path | None = None
    """Certificate chain (PEM); with it the service speaks HTTPS."""
    ssl_keyfile: Path | None = None
    """Private key of the certificate, where it is in a file of its own."""

    @model_validator(mode="after")
    def _key_has_certificate(self) -> Self:
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile without ssl_certfile")
        return self


class RewardServiceConfig(Section):
    """What scores responses, and where it can be reached."""

    scorer: str = REWARD_MODEL
    """What a run uses: `reward_model` (its trained reward model), a name in `scorers`, the dotted path of a function
    `f(prompts, responses, **columns) -> list[float]`, or `none` where an environment gives all the rewards."""
    scorers: dict[str, ScorerConfig] = Field(default_factory=dict)
    """Scorers by name: `[reward_service.scorers.NAME]` with a kind and its settings."""
    url: str | None = Field(default=None, pattern=r"^https?://")
    """A reward service elsewhere that answers POST /v1/rewards, instead of one of this run's own; its token is
    ANTIPHON_TOKEN."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the service; the least of them where there is `max_replicas`."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Copies that Ray Serve may add under load; none unless set."""
    host: str = "127.0.0.1"
    """Address to bind when a port is set; beyond loopback a token (ANTIPHON_TOKEN) is required."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """HTTP port; without one the service is reached by handle alone."""
    http: HttpConfig = HttpConfig()
    """Limits of the HTTP face."""
    timeout_s: float = Field(default=60.0, ge=MIN_TIMEOUT_S)
    """Deadline of one scoring call."""
    patience_s: float = Field(default=300.0, ge=0)
    """How long a run waits for a reward service that is down, busy or answers nonsense before it ends."""
    drain_timeout_s: float = Field(default=10.0, ge=0)
    """How long a copy that is stopped may finish the calls it has."""
    max_batch_size: int = Field(default=256, ge=1)
    """Most responses scored in one forward pass of a reward model."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Most tokens, padding included, in one forward pass of a reward model; a longer text goes alone."""
    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs that Ray reserves for each replica."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for each replica."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is less than num_replicas = {self.num_replicas}")
        if self.url is not None and self.port is not None:
            raise ValueError("port opens a service of this run's own, and url names another one: set one of them")
        return self

    @field_validator("scorers")
    @classmethod
    def _names(cls, scorers: dict[str, ScorerConfig]) -> dict[str, ScorerConfig]:
        for name in scorers:
            if not SCORER_NAME.fullmatch(name):
                raise ValueError(f"{name}: is no name: a letter, then letters, digits, '_', '.' and '-'")
            if name in (REWARD_MODEL, NO_SCORER):
                raise ValueError(f"{name}: means something else here: take another name")
        check_composites(scorers)
        return scorers

    def serving(self, scorers: Sequence[str]) -> RewardServiceConfig:
        """The same service with all of these scorers, each by what it is called here, even a dotted path.

        The run's reward model is the default where it is among them, else the first; none at all leave nothing.
        """
        wanted = sorted(dict.fromkeys(s for s in scorers if s != NO_SCORER), key=lambda scorer: scorer != REWARD_MODEL)
        default, *others = wanted or [NO_SCORER]
        functions = {path: FunctionConfig(kind="function", path=path) for path in others if path not in self.scorers}
        return self.model_copy(update={"scorer": default, "scorers": {**self.scorers, **functions}})

    def needs_reward_model(self) -> bool:
        """Whether what a run uses, or a part of any scorer, is the run's trained reward model."""
        composites = [scorer for scorer in self.scorers.values() if isinstance(scorer, CompositeConfig)]
        return self.scorer == REWARD_MODEL or any(REWARD_MODEL in composite.members() for composite in composites)
