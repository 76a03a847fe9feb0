"""Which reward models an application serves: for each scorer the present one and the one before it.

A folder that was published never changes; the digest of its weights goes with it, so that who loads it can tell.
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
    """The reward model in `folder`. Raises InputError for weights that are no safetensors."""
    return PublishedModel(str(folder.absolute()), weights_digest(folder))


class ModelVersions(NamedTuple):
    """The models that are served, and those whose versions can still be asked for: of the same names."""

    present: Models
    previous: Models

    def followed_by(self, name: str, model: PublishedModel) -> ModelVersions:
        """The same after a new model took the place of that scorer's."""
        return ModelVersions({**self.present, name: model}, {**self.previous, name: self.present[name]})

    def to_json(self) -> dict[str, Any]:
        """Plain values, as Ray Serve takes them: by scorer."""
        return {
            name: {"present": asdict(model), "previous": asdict(self.previous[name])}
            for name, model in self.present.items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelVersions:
        """What `to_json` gave."""
        return cls(*({name: PublishedModel(**of[which]) for name, of in values.items()} for which in cls._fields))
