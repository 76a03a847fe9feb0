"""Pin the models and data sets of the Hub that the settings name to commits, so that a resume takes the same files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cluster.config import Section
from cluster.hub.download import commit_of
from cluster.hub.names import RepoKind, hub_name
from deploy.config.schema import RunConfig
from reward_service.config.scorers import TrainedModelConfig

T = TypeVar("T", bound=Section)


def pinned(config: RunConfig, known: Mapping[str, str]) -> RunConfig:
    """Return the settings with a commit in each name of the Hub, and with those commits in `run.hub_commits`.

    `known` holds commits by the names as written in the run file; the Hub is asked for others. Raises InputError naming
    a repository or revision that it does not have.
    """
    pins = _Pins(known)
    scorers = {
        name: pins.of(scorer, "model") if isinstance(scorer, TrainedModelConfig) else scorer
        for name, scorer in config.reward_service.scorers.items()
    }
    sections = {
        "model": pins.of(config.model, "model"),
        "data": pins.of(config.data, "dataset"),
        "tasks": {name: pins.of(task, "dataset") for name, task in config.tasks.items()},
        "reward_service": config.reward_service.model_copy(update={"scorers": scorers}),
    }
    if not pins.commits:
        return config
    commits = {**config.run.hub_commits, **pins.commits}
    return config.model_copy(update={**sections, "run": config.run.model_copy(update={"hub_commits": commits})})


@dataclass
class _Pins:
    """Pins paths that are names of the Hub; `commits` holds what it has pinned, by the names as written."""

    known: Mapping[str, str]
    commits: dict[str, str] = field(default_factory=dict)

    def of(self, section: T, kind: RepoKind) -> T:
        """Return the section with a commit in each of its names."""
        paths = {key: self._path(value, kind) for key, value in section if isinstance(value, Path)}
        return section.model_copy(update=paths)

    def _path(self, path: Path, kind: RepoKind) -> Path:
        name = hub_name(path, kind)
        if name is None or name.commit is not None:
            return path
        written = name.repo + (f"@{name.revision}" if name.revision else "")
        commit = self.known.get(written) or commit_of(name)
        self.commits[written] = commit
        return Path(name.at(commit).text)
