"""Which parts a reward may have, told from the settings alone, so that a run that asks for another fails at once.

Imports neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from cluster.config import Section
from reward_service.config.composite import CompositeConfig
from reward_service.config.scorers import ForbiddenConfig, LengthConfig
from reward_service.config.service import RewardServiceConfig

ANY = "*"
MEASURES = {
    "exact": ("found",),
    "numeric": ("found", "answer"),
    "math": ("found",),
    "regex": ("matched",),
    "truncation": ("cut_off",),
    "json_schema": ("parsed",),
    "repetition": ("repeated_share",),
    "language": ("probability",),
    "code": ("num_tests", "num_passed"),
    "forbidden": ("num_forbidden", "violation"),
    "judge": ("opinion",),
}
"""What each kind of rule measures beside its reward. Of kinds that are not here any part may come."""


def part_names(service: RewardServiceConfig) -> list[str]:
    """Names of the parts that rewards of the run's scorer may have; `*` in them stands for anything."""
    return [ANY] if service.url is not None else list(_of(service.scorer, service.scorers))


def may_have_part(service: RewardServiceConfig, part: str) -> bool:
    """Whether a reward of the run's scorer may have it."""
    return any(fnmatchcase(part, name) for name in part_names(service))


def _of(name: str, scorers: Mapping[str, Section]) -> Iterator[str]:
    config = scorers.get(name)
    if isinstance(config, CompositeConfig):
        for member in config.members():
            yield member
            yield from (f"{member}/{part}" for part in _of(member, scorers) if part != member)
        return
    kind = str(getattr(config, "kind", None))
    if isinstance(config, LengthConfig):
        yield from (name, f"num_{config.unit}")
    elif kind not in MEASURES or (isinstance(config, ForbiddenConfig) and config.function is not None):
        yield ANY
    else:
        yield from (name, *MEASURES[kind])
