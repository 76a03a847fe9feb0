"""The `[reward_service]` section. Imports neither torch nor ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from cluster.config import Section, setting
from reward_service.config.composite import REWARD_MODEL as REWARD_MODEL
from reward_service.config.composite import CompositeConfig, check_composites
from reward_service.config.scorers import SCORER_NAME, FunctionConfig, ScorerConfig

MIN_TIMEOUT_S = 0.1
"""Shortest deadline of a call; a shorter one could only fail."""
NO_SCORER = "none"
"""The scorer of a run whose environment gives all rewards."""


def app_name(run_name: str) -> str:
    """Return the name of the run's Ray Serve application; every run on a cluster has its own."""
    return f"antiphon-{run_name}-rewards"


class HttpConfig(Section):
    """Limits of the HTTP server: sizes, deadlines and tokens."""

    tokens: Path | None = setting(None, may_change="always")
    """File of named bearer tokens, written by `antiphon token`. ANTIPHON_TOKEN is accepted as well."""
    max_body_bytes: int = setting(16 * 2**20, may_change="always", ge=1)
    """Maximum body of a request; a larger one is refused while it is read."""
    max_buffered_bytes: int = setting(64 * 2**20, may_change="always", ge=1)
    """Maximum total size of pending bodies, over all requests."""
    max_waiting_requests: int = setting(512, may_change="always", ge=1)
    """Maximum concurrent requests; further ones are refused with a time after which to retry."""
    max_connections: int = setting(2048, may_change="always", ge=1)
    """Maximum open connections."""
    header_timeout_s: float = setting(10.0, may_change="always", gt=0)
    """Deadline for the head of a request, and for a TLS handshake."""
    body_timeout_s: float = setting(30.0, may_change="always", gt=0)
    """Deadline for the body of a request."""
    write_timeout_s: float = setting(30.0, may_change="always", gt=0)
    """Deadline for a client to read an answer."""
    require_token: bool = setting(False, may_change="always")
    """Require a token even if none exists yet. A token is always required beyond loopback, and if one exists."""
    ssl_certfile: Path | None = setting(None, may_change="always")
    """Certificate chain (PEM); enables HTTPS."""
    ssl_keyfile: Path | None = setting(None, may_change="always")
    """Private key of the certificate, if it is in a separate file."""

    @model_validator(mode="after")
    def _key_has_certificate(self) -> Self:
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile without ssl_certfile")
        return self


class RewardServiceConfig(Section):
    """The scorers of a run, and the address of the service."""

    scorer: str = setting(REWARD_MODEL, may_change="recorded", reevaluates=True)
    """Scorer of the run: `reward_model` (its trained reward model), a name in `scorers`, the dotted path of a function
    `f(prompts, responses, **columns) -> list[float]`, or `none` if the environment gives all rewards."""
    scorers: dict[str, ScorerConfig] = setting({}, may_change="recorded", reevaluates=True)
    """Scorers by name: `[reward_service.scorers.NAME]` with a kind and its settings."""
    url: str | None = setting(None, may_change="recorded", reevaluates=True, pattern=r"^https?://")
    """URL of another reward service that answers POST /v1/rewards, used instead of the run's own; its token is
    ANTIPHON_TOKEN."""
    num_replicas: int = setting(1, may_change="always", ge=1)
    """Replicas of the service; the minimum if `max_replicas` is set."""
    max_replicas: int | None = setting(None, may_change="always", ge=1)
    """Enables autoscaling by Ray Serve up to this many replicas."""
    host: str = setting("127.0.0.1", may_change="always")
    """Address to bind if a port is set; beyond loopback a token (ANTIPHON_TOKEN) is required."""
    port: int | None = setting(None, may_change="always", ge=1, le=65535)
    """HTTP port. If unset, the service is reached by Ray Serve handle only."""
    http: HttpConfig = HttpConfig()
    """Limits of the HTTP server."""
    timeout_s: float = setting(60.0, may_change="always", ge=MIN_TIMEOUT_S)
    """Deadline of one scoring call. A call of a Python function is ended after nine tenths of it."""
    patience_s: float = setting(300.0, may_change="always", ge=0)
    """How long a run waits for a reward service that is down, busy or returns invalid answers before the run ends."""
    drain_timeout_s: float = setting(10.0, may_change="always", ge=0)
    """How long a stopping replica may finish its calls."""
    max_batch_size: int = setting(256, may_change="always", ge=1)
    """Maximum responses scored in one forward pass of a reward model."""
    max_batch_tokens: int = setting(16384, may_change="always", ge=1)
    """Maximum tokens, padding included, in one forward pass of a reward model; a longer text is scored alone."""
    num_cpus: float = setting(0.25, may_change="always", ge=0)
    """CPUs that Ray reserves for each replica."""
    num_gpus: float = setting(0.0, may_change="always", ge=0)
    """GPUs that Ray reserves for each replica."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is less than num_replicas = {self.num_replicas}")
        if self.url is not None and self.port is not None:
            raise ValueError("port opens the run's service to HTTP, and url names another service: set one of them")
        return self

    @field_validator("scorers")
    @classmethod
    def _names(cls, scorers: dict[str, ScorerConfig]) -> dict[str, ScorerConfig]:
        for name in scorers:
            if not SCORER_NAME.fullmatch(name):
                raise ValueError(
                    f"{name}: is not a valid name: start with a letter, then use letters, digits, '_', '.' and '-'"
                )
            if name in (REWARD_MODEL, NO_SCORER):
                raise ValueError(f"{name}: is a reserved name: use another one")
        check_composites(scorers)
        return scorers

    def serving(self, scorers: Sequence[str]) -> RewardServiceConfig:
        """Return the settings of a service with all of these scorers, by their names or dotted paths.

        The default is the run's reward model if it is one of them, else the first; `none` if there are none.
        """
        wanted = sorted(dict.fromkeys(s for s in scorers if s != NO_SCORER), key=lambda scorer: scorer != REWARD_MODEL)
        default, *others = wanted or [NO_SCORER]
        functions = {path: FunctionConfig(kind="function", path=path) for path in others if path not in self.scorers}
        return self.model_copy(update={"scorer": default, "scorers": {**self.scorers, **functions}})

    def needs_reward_model(self) -> bool:
        """Return whether the run's scorer, or a part of any composite, is the run's trained reward model."""
        composites = [scorer for scorer in self.scorers.values() if isinstance(scorer, CompositeConfig)]
        return self.scorer == REWARD_MODEL or any(REWARD_MODEL in composite.members() for composite in composites)
