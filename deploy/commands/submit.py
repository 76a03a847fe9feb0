"""Submits a run to a Ray cluster as a Ray job, follows its log and ends as it ends.

What travels is the working directory without what can be made again; where the run is kept must outlive the job.
Knows the command line of a run and nothing of what happens in it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.errors import AntiphonError, InputError
from deploy.config.schema import RunConfig
from reward_service.http.address import is_loopback

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "/runs",
    "/build",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
    "node_modules",
)
STOP_WAIT_S = 60
ANSWER_TIMEOUT_S = 10.0
AGENT_STARTING = "No available agent"
AGENT_TIMEOUT_S = 60.0
LOST_TIMEOUT_S = 30.0
POLL_S = 0.5

# The interpreter that Ray itself runs with, whatever the PATH of its processes says: the job's shell is a child of
# the job supervisor, a child of the raylet, whose command line names it.
FIND_PYTHON = (
    "raylet=$(awk '/^PPid:/ {print $2}' /proc/$PPID/status 2>/dev/null); "
    "python=$(tr '\\0' '\\n' 2>/dev/null </proc/$raylet/cmdline"
    " | sed -n 's/^--python_worker_command=\\([^\" ]*\\) .*/\\1/p'); "
)


def submit(
    config: RunConfig, run_file: Path, options: Sequence[str], *, address: str, runs_dir: Path, wait: bool
) -> int:
    """Run `antiphon train run_file` as a Ray job; returns its exit code, or 0 at once without `wait`.

    `options` are train's own beside --runs-dir. Raises InputError when no Ray answers at `address` or it refuses, and
    KeyboardInterrupt while the job goes on.
    """
    require_ray(address)
    command = entrypoint(run_file, [*options, "--runs-dir", str(runs_dir)])
    client, job_id = _submit(address, command, runtime_env(config))
    print(f"{job_id} runs on {address}; it is kept in {runs_dir / config.run.name}", file=sys.stderr, flush=True)
    if not wait:
        print(how_to_go_on(job_id, address), file=sys.stderr)
        return 0
    try:
        return asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; {how_to_go_on(job_id, address)}", file=sys.stderr)
        raise


def entrypoint(run_file: Path, options: Sequence[str]) -> str:
    """The job's shell command. Raises InputError when the run file would not travel."""
    path = Path(os.path.abspath(run_file))
    if not path.is_relative_to(Path.cwd()):
        raise InputError(str(run_file), f"only files below the working directory travel with a job ({Path.cwd()})")
    command = ["-m", "deploy.cli", "train", str(path.relative_to(Path.cwd())), *options]
    return f'{FIND_PYTHON}exec "${{python:-python}}" {shlex.join(command)}'


def kept_where(config: RunConfig, address: str) -> Path:
    """The runs folder as the job sees it, absolute. Raises InputError where it would not outlive the job."""
    runs_dir = config.run.runs_dir
    if not runs_dir.is_absolute():
        if not is_local(address):
            what = f"{runs_dir} is relative: on another machine, name an absolute folder on storage that outlives it"
            raise InputError("--runs-dir", what)
        runs_dir = runs_dir.absolute()
    session_folders = {Path("/tmp/ray"), Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"}
    for folder in session_folders:
        if Path(os.path.normpath(runs_dir)).is_relative_to(folder):
            raise InputError("--runs-dir", f"{runs_dir} is in Ray's session folder {folder}, which ends with Ray")
    return runs_dir


def is_local(address: str) -> bool:
    """Whether the Ray at `address` is on this machine."""
    return is_loopback(urlsplit(_with_scheme(address)).hostname or "")


def require_ray(address: str) -> None:
    """Raise InputError unless something answers HTTP at `address`; a refusal is an answer.

    A Ray that asks for a token gets this user's own (RAY_AUTH_TOKEN or ~/.ray/auth_token), whatever the mode's default.
    """
    url = _with_scheme(address).rstrip("/")
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError(address, "give the address of Ray's dashboard, such as http://127.0.0.1:8265")
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == HTTPStatus.UNAUTHORIZED:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(address, f"no Ray answers at this address ({reason})") from error


def _with_scheme(address: str) -> str:
    return address if "://" in address else f"http://{address}"


def runtime_env(config: RunConfig) -> dict[str, Any]:
    """What the job is given: the working directory, all but what can be made again, and its environment."""
    return {"working_dir": ".", "excludes": [*EXCLUDES, *_own_runs(config)], "env_vars": _environment(config)}


def _own_runs(config: RunConfig) -> list[str]:
    runs_dir = Path(os.path.abspath(config.run.runs_dir))
    below = runs_dir.is_relative_to(Path.cwd()) and runs_dir != Path.cwd()
    return [f"/{runs_dir.relative_to(Path.cwd())}"] if below else []


def _environment(config: RunConfig) -> dict[str, str]:
    """What the job's processes get: a minute for a clean end, and the token where a port will ask for it."""
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    token = os.environ.get("ANTIPHON_TOKEN")
    if token and config.reward_service.port is not None:
        environment["ANTIPHON_TOKEN"] = token
    return environment


def _submit(address: str, command: str, environment: dict[str, Any]) -> tuple[JobSubmissionClient, str]:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(_with_scheme(address))
        return client, _submitted(client, command, environment)
    except AuthenticationError as error:
        what = "Ray refuses the token (set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
        raise InputError(address, what) from error
    except ConnectionError as error:
        raise InputError(address, "no Ray answers at this address") from error
    except (RuntimeError, ValueError) as error:
        raise AntiphonError(address, f"Ray did not take the job: {str(error).splitlines()[0]}") from error


def _submitted(client: JobSubmissionClient, command: str, environment: dict[str, Any]) -> str:
    """Submit, waiting up to AGENT_TIMEOUT_S for the agent of a Ray that has only just started."""
    give_up = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=command, runtime_env=environment))
        except RuntimeError as error:
            if AGENT_STARTING not in str(error) or time.monotonic() > give_up:
                raise
        time.sleep(POLL_S)


async def _follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print the job's log as it grows, until the job has ended; a broken connection is taken up again."""
    import aiohttp

    printed, last_error = 0, ""
    while True:
        seen = 0
        try:
            async for chunk in client.tail_job_logs(job_id):
                new = chunk[max(0, printed - seen) :]
                seen += len(chunk)
                printed = max(printed, seen)
                last_error = next((x for x in reversed(new.splitlines()) if x.startswith("error: ")), last_error)
                print(new, end="", flush=True)
        except (RuntimeError, aiohttp.ClientError) as error:
            print(f"lost the job's log, trying again ({error})", file=sys.stderr)
        info = await _info(client, job_id)
        if info.status.is_terminal():
            return _ended(job_id, info, last_error)
        await asyncio.sleep(POLL_S)


async def _info(client: JobSubmissionClient, job_id: str) -> Any:
    """What Ray says of the job. Raises AntiphonError when Ray gives no answer for half a minute."""
    give_up = time.monotonic() + LOST_TIMEOUT_S
    while True:
        try:
            return await asyncio.to_thread(client.get_job_info, job_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > give_up:
                what = f"Ray has not answered for {LOST_TIMEOUT_S:g} s ({str(error).splitlines()[0]})"
                raise AntiphonError(job_id, what) from error
        await asyncio.sleep(POLL_S)


def _ended(job_id: str, info: Any, last_error: str) -> int:
    """The exit code of an ended job; its own last error line, or Ray's word, goes to stderr."""
    if info.status.name == "SUCCEEDED":
        return 0
    if info.status.name == "STOPPED":
        print(f"{job_id} was stopped; the same command goes on with its run", file=sys.stderr)
        return 130
    ray_says = (info.message or "").strip().splitlines() or ["it failed"]
    print(last_error or f"error: {job_id}: {ray_says[0]}", file=sys.stderr)
    code = info.driver_exit_code
    return code if code is not None and code > 0 else 1


def how_to_go_on(job_id: str, address: str) -> str:
    """The commands that follow and stop a job."""
    return (
        f"follow it: ray job logs -f --address {address} {job_id}\nstop it: ray job stop --address {address} {job_id}"
    )
