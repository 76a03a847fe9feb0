"""Where errors become what a person sees: a line on stderr, a run's status, a traceback in its logs.

The one place of the command line that catches everything; knows no command.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import Iterator

from cluster.errors import AntiphonError
from deploy.run.directory import RunDirectory
from deploy.runtime.signals import interruptible


def say_error(error: AntiphonError) -> int:
    """Print the error's one line; returns the exit code."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    return error.exit_code


@contextlib.contextmanager
def running(run: RunDirectory) -> Iterator[None]:
    """Keeps status.json right while the context lasts, however it ends.

    What was raised goes on as an AntiphonError with its traceback in RUN/logs, or as KeyboardInterrupt; SIGTERM and a
    closed terminal interrupt like Ctrl-C.
    """
    run.update_status(state="RUNNING", stage=None, step=0, ray_address=None, error=None)
    try:
        with interruptible():
            yield
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        run.update_status(state="INTERRUPTED", ray_address=None)
        print(f"interrupted; the same command goes on with {run.path}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt from error
    except AntiphonError as error:
        run.update_status(state="FAILED", ray_address=None, error=str(error))
        _keep_traceback(run, error)
        raise
    except Exception as error:
        kept = _keep_traceback(run, error)
        what = first_line(error)
        run.update_status(state="FAILED", ray_address=None, error=what)
        raise AntiphonError("antiphon", f"{what} (see {kept})") from error
    run.update_status(state="DONE", ray_address=None)


def first_line(error: Exception) -> str:
    """An unforeseen error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _keep_traceback(run: RunDirectory, error: Exception) -> str:
    path = run.path / "logs" / "errors.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(time.strftime("--- %Y-%m-%d %H:%M:%S\n") + "".join(traceback.format_exception(error)) + "\n")
    return str(path)
