"""The stages before PPO: model and data from their builders, SFT, preferences; and how a supervised one is run.

Each leaves one artefact in the run directory, whole or not at all; its presence is what "done" means.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from rollout_actors.environments.pool.pool import try_out

from cluster import user_code
from cluster.actors.remote import stream_task
from cluster.data.broken_rows import BrokenRows
from cluster.data.datasets import Source
from cluster.data.prompt_order import PromptOrder
from cluster.errors import AntiphonError, EnvironmentFault, InputError
from cluster.scoring import ScoreRequest
from deploy.config.functions import scorer_paths
from deploy.data.prompts import _say_broken, prompt_rows
from deploy.run.artifacts import data_folder, data_path, model_path, policy_path
from deploy.run.directory import checkpoint_step
from deploy.run.layout import HELD_OUT
from deploy.runtime.session import Session, dtype_of
from reward_service.scorers.trial import Trial
from reward_service.scorers.trial import try_functions as try_scorers
from rollout_actors.prompts import read_rows, scorer_columns

if TYPE_CHECKING:
    from learner.supervised.group import SupervisedLearnerGroup


async def prepare(session: Session) -> None:
    """Build the starting model and the data where the run file names builders."""
    config, run = session.config, session.run
    data = [
        (data_folder(run.path, name), task.builder, config.key_of(name, "builder"))
        for name, task in config.by_task().items()
    ]
    for target, path, key in ((run.path / "model", config.model.builder, "model.builder"), *data):
        if path and not target.exists():
            async for _ in stream_task(
                _build, path, key, target, seed=config.run.seed, name=key, log_path=session.log_path(key)
            ):
                pass


def _build(path: str, key: str, target: Path, *, seed: int) -> Iterator[None]:
    """Run a builder in a process of its own; what it writes appears whole or not at all."""
    builder = user_code.load(path, key)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    builder(partial, seed=seed)
    partial.rename(target)
    yield


async def try_functions(session: Session) -> None:
    """Raise InputError where a first try shows that an environment or a scorer breaks its protocol.

    Nothing is loaded yet. A scorer, which may bring anything with it, is called in a process of its own.
    """
    trials = [trial for task in session.config.by_task() if (trial := await _tried_environment(session, task))]
    timeout_s, name = session.config.reward_service.timeout_s, "scorer_trial"
    if trials:
        log_path = session.log_path(name)
        async for _ in stream_task(try_scorers, trials, timeout_s=timeout_s, name=name, log_path=log_path):
            pass


async def _tried_environment(session: Session, task: str) -> Trial | None:
    """Try a task's environment; what its scorers are to be tried with, None where they are ours or somebody else's."""
    config = session.config
    environment = config.by_task()[task].environment
    scorers = {} if config.reward_service.url is not None else scorer_paths(config, task)
    if environment.path is None and not scorers:
        return None
    prompt, columns = _first_prompt(session, task)
    if environment.path is not None:
        try:
            await try_out(environment, columns)
        except EnvironmentFault as fault:
            raise InputError(fault.where, fault.what) from fault
        columns["conversation"] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
    return Trial(scorers, ScoreRequest("trial", prompt, "", columns)) if scorers else None


def _first_prompt(session: Session, task: str) -> tuple[str, dict[str, Any]]:
    """The text of a task's first prompt, without a chat template, and its columns; nothing where there is none."""
    config = session.config
    path, reading = data_path(config, session.run.path, "prompts", task), config.data.reading()
    if not path.exists():
        return "", {}
    row = read_rows(path, reading, BrokenRows(reading.broken_rows))[0]
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return text, scorer_columns(row)


async def run_sft(session: Session) -> None:
    """Supervised fine-tuning into `sft/`."""
    config, run = session.config, session.run
    session.view.stage("sft", config.sft.num_steps)
    data = [
        Source(data_path(config, run.path, "sft", name), task.weight)
        for name, task in config.by_task().items()
        if task.sft or task.builder
    ]
    model, output = model_path(config, run.path), run.path / "sft"
    result = await train(session, Supervised("sft", "sft", model=model, data=data, output=output))
    run.update_summary({f"sft.{name}": value for name, value in result.items()})
    if "best_step" in result:
        session.view.note(f"sft: held-out loss {result['held_out_loss']:.4f} at step {result['best_step']:,.0f}, kept")


@dataclass(frozen=True, slots=True)
class Supervised:
    """What a supervised stage trains, on what and into what; metrics and checkpoints are kept under `name`.

    `data` are its `sources`; the others are as in `SupervisedSettings`, without the endings _path.
    """

    stage: Literal["sft", "reward_model"]
    name: str
    model: Path
    data: Sequence[Source]
    output: Path
    fresh: Path | None = None
    more: Path | None = None
    by_prompt: bool = False
    member: int = 0


async def train(session: Session, task: Supervised) -> dict[str, float]:
    """Run a supervised stage on learners of its own; returns what they yielded beside its steps.

    A stage that goes on from a checkpoint yields some steps again; what is recorded already is not recorded twice.
    """
    result: dict[str, float] = {}
    newest = session.run.newest_checkpoint(task.name)
    recorded = {row["step"] for row in session.run.metrics() if row["stage"] == task.name} if newest else set()
    if newest:
        session.view.note(f"{task.name}: goes on after step {checkpoint_step(newest):,}")
    learners = await _start_learners(session, task)
    try:
        async for metrics in learners.train():
            if "step" not in metrics:
                result |= metrics
                _say_what_was_cut(session, task.name, metrics)
            elif metrics["step"] not in recorded:
                session.log_step(task.name, metrics)
    finally:
        await learners.shutdown()
    return result


async def _start_learners(session: Session, task: Supervised) -> SupervisedLearnerGroup:
    """The learners of a stage. Brings RLlib and torch into this process; commands without a stage are spared that."""
    with session.start_up.phase("imports"):
        from learner.supervised.group import SupervisedLearnerGroup
        from learner.supervised.rank import SupervisedSettings

    config, path = session.config, session.run.path
    settings = SupervisedSettings(
        config=config.learner,
        stage=getattr(config, task.stage),
        model_path=task.model,
        sources=tuple(task.data),
        output_path=task.output,
        seed=config.run.seed,
        dtype=dtype_of(config, task.model),
        checkpoints_path=path / "checkpoints" / task.name,
        fresh_path=task.fresh,
        more_path=task.more,
        by_prompt=task.by_prompt,
        member=task.member,
        reading=config.data.reading(),
        log_dir=path / "logs",
    )
    return await SupervisedLearnerGroup.start(settings)


def _say_what_was_cut(session: Session, stage: str, counts: dict[str, float]) -> None:
    """Notes where examples were too long, broken or without a counterpart."""
    if counts.get("num_cut") or counts.get("num_dropped"):
        kept = f"{counts['num_examples']:,} examples kept"
        session.view.note(f"{stage}: {kept}, {counts['num_cut']:,} of them cut, {counts['num_dropped']:,} dropped")
    if num := counts.get("num_broken"):
        _say_broken(session, stage, num, f"logs/broken_rows_{stage.partition('/')[0]}.txt")
    if num := counts.get("num_unpaired"):
        session.view.note(f"{stage}: {num:,.0f} rows with a label have no counterpart: left out")


async def collect_preferences(session: Session) -> None:
    """Sample pairs from the SFT policy, have them labelled, and write `preferences.parquet` in TRL's columns."""
    config, run = session.config, session.run
    settings = config.preferences
    num = settings.num_pairs + settings.num_held_out_pairs
    session.view.stage("preferences", num)
    if settings.annotator is None:
        raise AntiphonError("preferences.annotator", "nobody labels the pairs (set it, or data.preferences)")
    annotate = user_code.load(settings.annotator, "preferences.annotator")
    rows = await prompt_rows(session, "prompts", altered_share=config.data.adversarial_share)
    order = PromptOrder(rows, config.run.seed)
    prompts = [order.row(i)["prompt"] for i in range(num)]
    pairs = await session.sample(
        prompts,
        policy_path(config, run.path),
        num=2,
        seed=f"{config.run.seed}-preferences",
        progress=lambda num_done: session.view.step({"step": num_done}),
    )
    first, second = ([pair[k].text for pair in pairs] for k in (0, 1))
    labels = annotate(prompts, first, second, seed=config.run.seed)
    _write_pairs(session, prompts, first, second, labels)


def _write_pairs(
    session: Session, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], labels: Sequence[int]
) -> None:
    settings, path = session.config.preferences, session.run.path
    if len(labels) != len(prompts) or not set(labels) <= {0, 1}:
        raise AntiphonError("preferences.annotator", f"gave {len(labels)} labels for {len(prompts)} pairs, or not 0/1")
    chosen = [b if label else a for a, b, label in zip(first, second, labels, strict=True)]
    rejected = [a if label else b for a, b, label in zip(first, second, labels, strict=True)]
    table = pa.table({"prompt": list(prompts), "chosen": chosen, "rejected": rejected})
    session.run.update_summary({"reward_model.num_pairs": settings.num_pairs})
    if settings.oracle and settings.num_held_out_pairs:
        held_out = table.slice(settings.num_pairs).to_pydict()
        ceiling = _oracle_accuracy(user_code.load(settings.oracle, "preferences.oracle"), held_out)
        session.run.update_summary({"reward_model.noise_ceiling": ceiling})
        session.view.note(f"preferences: the oracle disagrees with {1 - ceiling:.1%} of the labels")
    parts = {HELD_OUT: table.slice(settings.num_pairs), "preferences.parquet": table.slice(0, settings.num_pairs)}
    for name, part in parts.items():
        partial = path / f"{name}.partial"
        pq.write_table(part, partial)
        partial.rename(path / name)


def _oracle_accuracy(oracle: Callable[..., list[float]], pairs: dict[str, list[str]]) -> float:
    """Share of labels that the oracle's own opinion agrees with; a tie agrees by half."""
    chosen = oracle(pairs["prompt"], pairs["chosen"])
    rejected = oracle(pairs["prompt"], pairs["rejected"])
    agreed = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)]
    return sum(agreed) / len(agreed)
