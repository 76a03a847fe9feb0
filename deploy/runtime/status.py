"""Reports errors to people: one line on stderr, the run's status, a traceback in the run's logs.

`recorded` is the one place above the stages that catches every exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import Iterator

from cluster.errors import AntiphonError, first_line
from deploy.run.directory import RunDirectory
from deploy.runtime.signals import interruptible


def say_error(error: AntiphonError) -> int:
    """Print the error in one line; returns the exit code."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    return error.exit_code


@contextlib.contextmanager
def running(run: RunDirectory) -> Iterator[None]:
    """Keep status.json correct while a command runs. Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt.

    Must be entered in the main thread. Errors are raised as in `recorded`.
    """
    try:
        with recorded(run), interruptible():
            yield
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        print(f"interrupted; the same command resumes {run.path}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt from error


@contextlib.contextmanager
def recorded(run: RunDirectory) -> Iterator[None]:
    """Keep status.json correct while the context lasts.

    Errors that are not an AntiphonError are raised as one. The traceback of every error is in RUN/logs/errors.log.
    """
    run.update_status(state="RUNNING", stage=None, step=0, ray_address=None, error=None)
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        run.update_status(state="INTERRUPTED", ray_address=None)
        raise
    except AntiphonError as error:
        run.update_status(state="FAILED", ray_address=None, error=str(error))
        _keep_traceback(run, error)
        raise
    except Exception as error:  # the boundary: any other error becomes an AntiphonError that names its traceback
        kept = _keep_traceback(run, error)
        line = type_and_first_line(error)
        run.update_status(state="FAILED", ray_address=None, error=line)
        raise AntiphonError("antiphon", f"{line} (see {kept})") from error
    run.update_status(state="DONE", ray_address=None)


def type_and_first_line(error: Exception) -> str:
    """Return an unexpected error's type and the first line of its message."""
    line, name = first_line(error), type(error).__name__
    return name if line == name else f"{name}: {line}"


def _keep_traceback(run: RunDirectory, error: Exception) -> str:
    path = run.path / "logs" / "errors.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(time.strftime("--- %Y-%m-%d %H:%M:%S\n") + "".join(traceback.format_exception(error)) + "\n")
    return str(path)
