"""The section of a composite scorer, and checks that composites fit the scorers that they name.

Imports neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from cluster.config import Section, setting

REWARD_MODEL = "reward_model"


class Statistics(Section):
    """Fixed mean and standard deviation of a scorer's rewards."""

    mean: float = setting(..., may_change="recorded")
    """Subtracted from a reward."""
    std: float = setting(..., may_change="recorded", gt=0)
    """Divides the difference."""


class CompositeConfig(Section):
    """A weighted sum of other scorers, with optional gates that veto it."""

    kind: Literal["composite"] = setting(..., may_change="recorded")
    parts: dict[str, float] = setting(..., may_change="recorded", min_length=1)
    """Weight of each scorer, by name (`reward_model` is the run's own)."""
    gates: tuple[str, ...] = setting((), may_change="recorded")
    """Scorers that veto the sum if their reward is at or below their threshold."""
    thresholds: dict[str, float] = setting({}, may_change="recorded")
    """Thresholds of gates; 0 if unset."""
    vetoed: float | None = setting(None, may_change="recorded")
    """Reward of a vetoed response. If unset: the gate's reward, or the weighted sum if that is lower, so that a veto
    never pays."""
    normalize: dict[str, Statistics | Literal["reward_statistics"]] = setting({}, may_change="recorded")
    """Mean and std by which a part is normalised before it is weighted; "reward_statistics" reads them from the file
    beside the reward model's weights."""

    @model_validator(mode="after")
    def _known(self) -> CompositeConfig:
        for field, names, known in (
            ("thresholds", self.thresholds, self.gates),
            ("normalize", self.normalize, self.parts),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"{field}: {name!r} is not among the {'gates' if known is self.gates else 'parts'}"
                    )
        return self

    def members(self) -> list[str]:
        """Return the names of its scorers, each once."""
        return list(dict.fromkeys([*self.parts, *self.gates]))


def reached(name: str, scorers: Mapping[str, Section]) -> set[str]:
    """Return the scorer's name and the names of all scorers that it is made of."""
    config = scorers.get(name)
    members = config.members() if isinstance(config, CompositeConfig) else []
    return {name}.union(*(reached(member, scorers) for member in members))


def check_composites(scorers: Mapping[str, Section]) -> None:
    """Raise ValueError for a composite of unknown scorers, of itself, or without needed statistics."""
    for name, config in scorers.items():
        if isinstance(config, CompositeConfig):
            _check_members(name, config, scorers)
    for name in scorers:
        _check_circle((name,), scorers)


def _check_members(name: str, config: CompositeConfig, scorers: Mapping[str, Section]) -> None:
    for field in ("parts", "gates"):
        for member in getattr(config, field):
            if member not in scorers and member != REWARD_MODEL:
                raise ValueError(f"{name}.{field}: there is no scorer {member!r}")
    for member, statistics in config.normalize.items():
        is_model = member == REWARD_MODEL or getattr(scorers[member], "kind", None) == "reward_model"
        if statistics == "reward_statistics" and not is_model:
            raise ValueError(f"{name}.normalize: {member!r} is not a reward model: give mean and std")


def _check_circle(path: tuple[str, ...], scorers: Mapping[str, Section]) -> None:
    config = scorers.get(path[-1])
    for member in config.members() if isinstance(config, CompositeConfig) else ():
        if member in path:
            raise ValueError(f"{path[0]}.parts: goes in a circle: {' -> '.join([*path, member])}")
        _check_circle((*path, member), scorers)
