"""The protocol of a scorer, and the registry of scorer kinds.

The file of a scorer registers its kind: `register_kind(ExactConfig, Kind(...))`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, get_args

from cluster.config import Section
from cluster.registry import Registry
from cluster.scoring import Outcome, ScoreRequest

S = TypeVar("S", bound=Section)


class Scorer(Protocol):
    """Scores responses one by one: the same request and version always get the same reward."""

    name: str
    version: str

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order: a score, or a RewardError that names its id."""


class Builder(Protocol):
    """The scorers and limits of the service that a scorer is built for."""

    max_batch_size: int
    max_batch_tokens: int
    timeout_s: float
    """Deadline of a scoring call."""

    def scorer(self, name: str) -> Scorer:
        """Return the scorer `name`, built once."""

    def reward_model_folder(self, name: str) -> Path:
        """Return the folder of the reward model that scorer `name` loads."""


def _nothing_to_check(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Kind(Generic[S]):
    """Checks and builds scorers of one settings class, from the scorer's name and settings."""

    build: Callable[[str, S, Builder], Scorer]
    check_files: Callable[[str, S, Mapping[str, Path]], None] = _nothing_to_check
    """Raises InputError for a missing or invalid file. Also gets the folders of reward models by scorer name."""
    check_environment: Callable[[str, S], None] = _nothing_to_check
    """Raises InputError for a function that can't be imported or a missing environment variable."""


SCORER_KINDS: Registry[Kind[Any]] = Registry("scorer kind")
"""Every scorer kind; `registry` imports the modules that register kinds."""


def register_kind(settings: type[S], kind: Kind[S]) -> None:
    """Register a kind under the name that its settings class has for the key `kind`."""
    (name,) = get_args(settings.model_fields["kind"].annotation)
    SCORER_KINDS.register(name)(kind)


def kind_of(name: str, section: Section) -> Kind[Any]:
    """Return the kind of the scorer `name` with these settings."""
    return SCORER_KINDS.find(getattr(section, "kind", ""), key=setting_key(name, "kind"))


def setting_key(name: str, field: str) -> str:
    """Return the run file's key of a scorer's setting, for error messages."""
    return f"reward_service.scorers.{name}.{field}"


async def close(scorer: Scorer) -> None:
    """Release the threads, processes and connections of a scorer, if it has any."""
    if hasattr(scorer, "aclose"):
        await scorer.aclose()
    elif hasattr(scorer, "close"):
        scorer.close()


def digest_of(*contents: str | Path) -> str:
    """Return 12 hexadecimal digits of sha256 over texts and files' bytes, in the given order."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content.read_bytes() if isinstance(content, Path) else content.encode()).digest())
    return digest.hexdigest()[:12]
