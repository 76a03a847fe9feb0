"""Names the parts that a reward may have, so that an unknown part fails at the start.

Imports neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from cluster.config import Section
from reward_service.config.composite import CompositeConfig
from reward_service.config.scorers import ScorerSection
from reward_service.config.service import RewardServiceConfig

ANY = "*"


def part_names(service: RewardServiceConfig) -> list[str]:
    """Return the names of the parts of the run's rewards; `*` in a name matches anything."""
    return [ANY] if service.url is not None else list(_parts_of(service.scorer, service.scorers))


def may_have_part(service: RewardServiceConfig, part: str) -> bool:
    """Return whether a reward of the run's scorer may have the part."""
    return any(fnmatchcase(part, name) for name in part_names(service))


def _parts_of(name: str, scorers: Mapping[str, Section]) -> Iterator[str]:
    config = scorers.get(name)
    if isinstance(config, CompositeConfig):
        for member in config.members():
            yield member
            yield from (f"{member}/{part}" for part in _parts_of(member, scorers) if part != member)
        return
    measures = config.measures() if isinstance(config, ScorerSection) else None
    yield from (ANY,) if measures is None else (name, *measures)
