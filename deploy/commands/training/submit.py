"""`antiphon submit`: run `antiphon train` as a Ray job, follow its log and exit with its exit code.

Ray uploads the working directory without the folders of EXCLUDES. The run directory must be on storage that outlives
the job.
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
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from cluster.errors import AntiphonError, InputError
from deploy.commands.arguments import RunFile, RunOptions, with_run_options
from deploy.config.inputs import check_inputs
from deploy.config.schema import RunConfig
from deploy.config.toml import to_toml
from deploy.run.open import read_target
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

# Finds the interpreter that Ray itself runs with; PATH may name another one. The job's shell is a child of the job
# supervisor, which is a child of the raylet, and the raylet's command line contains the interpreter.
FIND_PYTHON = (
    "raylet=$(awk '/^PPid:/ {print $2}' /proc/$PPID/status 2>/dev/null); "
    "python=$(tr '\\0' '\\n' 2>/dev/null </proc/$raylet/cmdline"
    " | sed -n 's/^--python_worker_command=\\([^\" ]*\\) .*/\\1/p'); "
)


@with_run_options
def submit(
    run_file: RunFile,
    address: Annotated[str, typer.Option(help="Address of Ray's dashboard, such as http://127.0.0.1:8265.")],
    options: RunOptions,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job's log until it ends.")] = True,
) -> None:
    """Train as a job on a Ray cluster, follow its log and exit with its exit code.

    Ray uploads the working directory without .venv, .git and runs. On another machine, --runs-dir must be an absolute
    path on storage that outlives the cluster's nodes.

    [dim]antiphon submit examples/reviews/run.toml --address http://127.0.0.1:8265[/dim]
    """
    if run_file.is_dir():
        raise InputError(str(run_file), "run directories are not uploaded with a job; submit the run file")
    config, _ = read_target(run_file, options.set_ or (), name=options.name, runs_dir=options.runs_dir, pin=False)
    if options.dry_run:
        print(to_toml(config), end="")
        return
    runs_dir = job_runs_dir(config, address)
    if is_local(address):
        check_inputs(config)
    arguments = [part for line in options.set_ or () for part in ("--set", line)] + ["--name", config.run.name]
    arguments += ["--fresh"] if options.fresh else []
    arguments += ["--allow-changes"] if options.allow_changes else []
    raise typer.Exit(submit_job(config, run_file, arguments, address=address, runs_dir=runs_dir, wait=wait))


def submit_job(
    config: RunConfig, run_file: Path, options: Sequence[str], *, address: str, runs_dir: Path, wait: bool
) -> int:
    """Run `antiphon train run_file` as a Ray job; returns its exit code, or 0 immediately without `wait`.

    `options` are further options of train, except --runs-dir. Raises InputError if no Ray answers at `address` or if it
    rejects the job. A KeyboardInterrupt leaves the job running.
    """
    require_ray(address)
    command = entrypoint(run_file, [*options, "--runs-dir", str(runs_dir)])
    client, job_id = _submit(address, command, runtime_env(config))
    print(f"{job_id} runs on {address}; run directory: {runs_dir / config.run.name}", file=sys.stderr, flush=True)
    if not wait:
        print(next_commands(job_id, address), file=sys.stderr)
        return 0
    try:
        return asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        print(f"\nthe job keeps running; {next_commands(job_id, address)}", file=sys.stderr)
        raise


def entrypoint(run_file: Path, options: Sequence[str]) -> str:
    """Return the job's shell command.

    Raises InputError if the run file is outside of the working directory.
    """
    path = Path(os.path.abspath(run_file))
    if not path.is_relative_to(Path.cwd()):
        raise InputError(str(run_file), f"is not in the working directory ({Path.cwd()}), so it is not uploaded")
    command = ["-m", "deploy.cli", "train", str(path.relative_to(Path.cwd())), *options]
    return f'{FIND_PYTHON}exec "${{python:-python}}" {shlex.join(command)}'


def job_runs_dir(config: RunConfig, address: str) -> Path:
    """Return the absolute runs folder of the job. Raises InputError if it would not outlive the job."""
    runs_dir = config.run.runs_dir
    if not runs_dir.is_absolute():
        if not is_local(address):
            message = f"{runs_dir} is relative; on another machine, give an absolute path on storage that outlives it"
            raise InputError("--runs-dir", message)
        runs_dir = runs_dir.absolute()
    session_folders = {Path("/tmp/ray"), Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"}
    for folder in session_folders:
        if Path(os.path.normpath(runs_dir)).is_relative_to(folder):
            raise InputError("--runs-dir", f"{runs_dir} is in Ray's session folder {folder}, which Ray deletes")
    return runs_dir


def is_local(address: str) -> bool:
    """Return whether the Ray at `address` is on this machine."""
    return is_loopback(urlsplit(_with_scheme(address)).hostname or "")


def require_ray(address: str) -> None:
    """Raise InputError unless an HTTP server answers at `address`; error responses count as answers.

    If Ray requires a token, turns token authentication on for this process, so that Ray's client sends the user's token
    (RAY_AUTH_TOKEN or ~/.ray/auth_token).
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
    """Return the job's runtime environment: working directory, excluded folders and environment variables."""
    return {"working_dir": ".", "excludes": [*EXCLUDES, *_runs_folder(config)], "env_vars": _environment(config)}


def _runs_folder(config: RunConfig) -> list[str]:
    runs_dir = Path(os.path.abspath(config.run.runs_dir))
    below = runs_dir.is_relative_to(Path.cwd()) and runs_dir != Path.cwd()
    return [f"/{runs_dir.relative_to(Path.cwd())}"] if below else []


def _environment(config: RunConfig) -> dict[str, str]:
    """Return the job's variables: the time to stop, and the token if the service opens a port."""
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
        return client, _submit_with_retries(client, command, environment)
    except AuthenticationError as error:
        raise InputError(address, "Ray rejects the token (set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)") from error
    except ConnectionError as error:
        raise InputError(address, "no Ray answers at this address") from error
    except (RuntimeError, ValueError) as error:
        raise AntiphonError(address, f"Ray rejected the job: {str(error).splitlines()[0]}") from error


def _submit_with_retries(client: JobSubmissionClient, command: str, environment: dict[str, Any]) -> str:
    """Submit the job; retries for up to AGENT_TIMEOUT_S while the agent of a new Ray is starting."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=command, runtime_env=environment))
        except RuntimeError as error:
            if AGENT_STARTING not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


async def _follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print the job's log as it grows and return the job's exit code; reconnects if the connection breaks."""
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
            print(f"lost the job's log, reconnecting ({error})", file=sys.stderr)
        info = await _info(client, job_id)
        if info.status.is_terminal():
            return _exit_code(job_id, info, last_error)
        await asyncio.sleep(POLL_S)


async def _info(client: JobSubmissionClient, job_id: str) -> Any:
    """Return Ray's job details. Raises AntiphonError if Ray does not answer for LOST_TIMEOUT_S."""
    deadline = time.monotonic() + LOST_TIMEOUT_S
    while True:
        try:
            return await asyncio.to_thread(client.get_job_info, job_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                message = f"Ray has not answered for {LOST_TIMEOUT_S:g} s ({str(error).splitlines()[0]})"
                raise AntiphonError(job_id, message) from error
        await asyncio.sleep(POLL_S)


def _exit_code(job_id: str, info: Any, last_error: str) -> int:
    """Return the exit code of a finished job; prints its last error line, or Ray's message, on stderr."""
    if info.status.name == "SUCCEEDED":
        return 0
    if info.status.name == "STOPPED":
        print(f"{job_id} was stopped; the same command resumes its run", file=sys.stderr)
        return 130
    message = (info.message or "").strip().splitlines() or ["the job failed"]
    print(last_error or f"error: {job_id}: {message[0]}", file=sys.stderr)
    code = info.driver_exit_code
    return code if code is not None and code > 0 else 1


def next_commands(job_id: str, address: str) -> str:
    """Return the commands that follow and stop a job."""
    return (
        f"follow it: ray job logs -f --address {address} {job_id}\nstop it: ray job stop --address {address} {job_id}"
    )
