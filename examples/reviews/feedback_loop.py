"""Run the whole loop of human feedback, with simulated annotators that use the HTTP API of the labelling page.

`python -m examples.reviews.feedback_loop RUN`: in each round the annotators choose between responses of the newest
policy, the reward model is trained again on all feedback so far, and PPO continues with it. RUN is a finished run of
this folder's run file, preferably with few preferences of its own. The oracle's mean rises, although no part of
training reads the oracle.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from cluster.errors import AntiphonError
from examples.reviews.annotator import annotate

ANNOTATORS = ("ana", "ben", "cleo")
CHOICES = ("first", "second")


def main(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to label in each round.")] = 400,
    steps: Annotated[int, typer.Option(min=1, help="PPO steps of each round.")] = 8,
) -> None:
    """Label, retrain the reward model, continue PPO, and print the oracle's mean after each round."""
    print(f"round 0: {_figures(run)}", flush=True)
    for number in range(1, rounds + 1):
        with _labelling(run, pairs) as url:
            num_labels = asyncio.run(_annotate_all(url))
        _antiphon("reward-model", str(run))
        _antiphon("train", str(run), "--set", f"learner.num_steps = {_num_steps(run) + steps}")
        print(f"round {number}: {num_labels} labels, {_figures(run)}", flush=True)


@contextmanager
def _labelling(run: Path, num_pairs: int) -> Iterator[str]:
    """Run `antiphon label` while the block runs, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [*_command("label", str(run)), "--port", port, "--num-pairs", str(num_pairs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("listening on "):
                yield line.removeprefix("listening on ").strip().removesuffix("/label")
                return
        raise AntiphonError("antiphon label", f"exited with status {process.wait()} before it listened")
    finally:
        process.terminate()
        process.wait()


async def _annotate_all(url: str) -> int:
    """Run all annotators concurrently until no pairs are left; return the number of their answers."""
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
        return sum(await asyncio.gather(*(_annotate(http, annotator) for annotator in ANNOTATORS)))


async def _annotate(http: httpx.AsyncClient, annotator: str) -> int:
    num_labels = 0
    while True:
        asked = await http.get("/v1/pairs/next", params={"annotator": annotator})
        pair = asked.raise_for_status().json()["pair"]
        if pair is None:
            return num_labels
        label = {"kind": "preference", "annotator": annotator, "choice": _choice(pair, annotator)}
        body = label | {"id": f"{pair['id']}:{annotator}", "pair": pair["id"]}
        body |= {name: pair[name] for name in ("prompt", "first", "second")}
        (await http.post("/v1/feedback", json=body)).raise_for_status()
        num_labels += 1


def _choice(pair: dict[str, Any], annotator: str) -> str:
    """Return the annotator's choice, drawn by Bradley and Terry's model."""
    seed = zlib.crc32(f"{pair['id']}:{annotator}".encode())
    (second_is_better,) = annotate([pair["prompt"]], [pair["first"]], [pair["second"]], seed=seed)
    return CHOICES[second_is_better]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deploy.cli", *arguments]


def _antiphon(*arguments: str) -> None:
    done = subprocess.run(_command(*arguments), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise AntiphonError(f"antiphon {arguments[0]}", done.stderr.strip().splitlines()[-1])


def _summary(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def _num_steps(run: Path) -> int:
    return int(tomllib.loads((run / "config.toml").read_text())["learner"]["num_steps"])


def _figures(run: Path) -> str:
    summary = _summary(run)
    model, after = summary["reward_model"], summary["evaluation"]["after"]
    return (
        f"reward model {model['accuracy']:.3f} of {model['num_pairs']} pairs; oracle {after['oracle']:.2f}, "
        f"grammatical {after['grammatical']:.2f}, KL {after['kl_nats']:.1f} nats"
    )


if __name__ == "__main__":
    typer.run(main)
