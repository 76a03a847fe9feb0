"""Write a run's metrics: lines of metrics.jsonl, which other code may rewrite meanwhile, and TensorBoard scalars.

TensorBoard shows each metric with its meaning from `cluster.metrics`. Its own event writer is used, so torch is not
needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from cluster.files import without_non_finite
from cluster.metrics import metric_of


class MetricsLog:
    """Appends rows; each stage is its own TensorBoard run, because steps are numbered per stage."""

    def __init__(self, run_path: Path) -> None:
        self._tensorboard = run_path / "tensorboard"
        self._rows = run_path / "metrics.jsonl"
        self._writers: dict[str, EventFileWriter] = {}

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one step's row, which names its `stage` and `step`; non-finite numbers are written as null."""
        with self._rows.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(without_non_finite(row), allow_nan=False) + "\n")
        stage, step = str(row["stage"]), int(row["step"])
        numbers = {key: float(v) for key, v in row.items() if isinstance(v, int | float) and key != "step"}
        values = [Summary.Value(tag=key, simple_value=v, metadata=_described(key)) for key, v in numbers.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer(stage, step).add_event(event)

    def _writer(self, stage: str, step: int) -> EventFileWriter:
        """Return the stage's writer; if the stage resumes, TensorBoard drops the steps that are repeated."""
        if stage not in self._writers:
            folder = self._tensorboard / stage
            resumed = folder.is_dir()
            writer = self._writers[stage] = EventFileWriter(str(folder))
            if resumed:
                start = SessionLog(status=SessionLog.START)
                writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))
        return self._writers[stage]

    def close(self) -> None:
        """Flush and close the event files."""
        for writer in self._writers.values():
            writer.close()


def _described(key: str) -> SummaryMetadata:
    metric = metric_of(key)
    unit = f" ({metric.unit})" if metric and metric.unit else ""
    return SummaryMetadata(display_name=key, summary_description=f"{metric.help}{unit}" if metric else "")
