"""The reward models that an application serves: for each scorer the current one and the previous one.

A published folder must never change; the digest of its weights lets a replica check that when it loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reward_service.scorers.files import weights_digest


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A reward model's folder and the digest of its weights."""

    folder: str
    digest: str


Models = Mapping[str, PublishedModel]
"""Reward models by the names of their scorers."""


def published(folder: Path) -> PublishedModel:
    """Return the reward model in `folder`. Raises InputError for weights that are not safetensors."""
    return PublishedModel(str(folder.absolute()), weights_digest(folder))


class ModelVersions(NamedTuple):
    """The current models, and the previous ones, which can still be requested by version."""

    present: Models
    previous: Models

    def followed_by(self, name: str, model: PublishedModel) -> ModelVersions:
        """Return the versions after `model` replaced the current model of scorer `name`."""
        return ModelVersions({**self.present, name: model}, {**self.previous, name: self.present[name]})

    def to_json(self) -> dict[str, Any]:
        """Return the versions as JSON values by scorer, for Ray Serve's `user_config`."""
        return {
            name: {"present": asdict(model), "previous": asdict(self.previous[name])}
            for name, model in self.present.items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelVersions:
        """Read the result of `to_json`."""
        current, previous = (
            {name: PublishedModel(**models[which]) for name, models in values.items()} for which in cls._fields
        )
        return cls(current, previous)
