"""Log-probabilities of the reference policy: computed once before the first step, and kept in a file.

The reference is the policy before training, so no second model is loaded. The file's name is a digest of all that the
numbers depend on; another layout (packing, micro-batches, ranks) would change only their last bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import InputError
from cluster.files import digest_files, replacing
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic
from learner.model.lora import adapters_off
from learner.place import Place
from learner.supervised.choices import Choice, Rated
from learner.supervised.loop import Row
from learner.supervised.sft import summed_logprobs

SLICE_ROWS = 64
"""Rows whose log-probabilities are computed between two reports of progress."""
NAME = "logprobs"
Places = Callable[[Sequence[Choice | Rated]], list[list[int]]]
"""Returns the indices of this rank's rows, in micro-batches."""


class ReferenceTable:
    """The reference log-probabilities [rows, 2] of some rows. All methods are collective.

    Without a folder they are not kept.
    """

    def __init__(self, folder: Path | None, place: Place, rows: Sequence[Choice | Rated], ranks: Ranks) -> None:
        self._rows = rows
        self._ranks = ranks
        self._path: Path | None = None
        if folder is not None and ranks.rank == 0:
            self._path = folder / f"{_digest(place, rows)}.safetensors"

    def read(self, device: torch.device) -> Tensor | None:
        """Return the kept table, or None if there is none."""
        table, found = self._zeros(device), torch.zeros(1)
        with self._ranks.agreed():
            if self._path is not None and self._path.exists():
                table += _read(self._path).to(device)
                found += 1
        return self._ranks.all_sum(table) if float(self._ranks.all_max(found)) else None

    def compute(self, net: ActorCritic, places: Places, device: torch.device) -> Generator[Row, None, Tensor]:
        """Compute and keep the table; yields the progress after each slice of rows."""
        table, num = self._zeros(device), len(self._rows)
        for start in range(0, num, SLICE_ROWS):
            rows = self._rows[start : start + SLICE_ROWS]
            for piece in places(rows):
                logprobs = _logprobs(net, [rows[place] for place in piece], device)
                table[[start + place for place in piece]] = logprobs
            yield {"num_reference": float(start + len(rows)), "num_rows": float(num)}
        table = self._ranks.all_sum(table)
        with self._ranks.agreed():
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self._path) as partial:
                    save_file({NAME: table.cpu()}, partial)
        return table

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(len(self._rows), 2, dtype=torch.float64, device=device)


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)[NAME]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(str(path), f"cannot be read: delete it, and it is computed again ({error})") from error


@torch.no_grad()
def _logprobs(net: ActorCritic, rows: Sequence[Choice | Rated], device: torch.device) -> Tensor:
    """Compute the log-probabilities [B, 2] of both completions of each row by the model without its adapters."""
    with adapters_off(net):
        sides = [summed_logprobs(net, [row.completions[side] for row in rows], device) for side in (0, 1)]
    return torch.stack(sides, dim=1).double()


def _digest(place: Place, rows: Sequence[Choice | Rated]) -> str:
    """Return the first 16 hexadecimal digits of a digest of the model, the data type and the rows."""
    weights = digest_files(sorted(place.model_path.glob("*.safetensors")))
    digest = hashlib.sha256(f"{weights} {place.dtype}".encode())
    for row in rows:
        digest.update(repr(row.completions).encode())
    return digest.hexdigest()[:16]
