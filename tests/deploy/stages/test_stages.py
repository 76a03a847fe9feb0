"""What the stages before PPO record and say of their data, with the processes they start replaced by generators."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.data.datasets import Source
from cluster.data.prompt_order import TaskPrompts
from cluster.errors import InputError, LearnerError
from deploy.config.load import load_run_config
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.open import open_run
from deploy.stages import supervised
from reward_service.scorers.trial import Trial
from tests.support.chat import make_tokenizer, user

RUN = """
[run]
stages = ["sft", "ppo"]
[model]
path = "model"
[data]
sft = "sft.jsonl"
prompts = "prompts.jsonl"
[rollout_actors]
max_prompt_tokens = 6
"""


class Session:
    """As much of a session as these stages use."""

    def __init__(self, config: RunConfig, run: RunDirectory) -> None:
        self.config, self.run = config, run
        self.notes: list[str] = []
        self.view = SimpleNamespace(note=self.notes.append, stage=lambda *_: None)

    def log_path(self, name: str) -> Path:
        return self.run.path / "logs" / f"{name}.log"

    def log_step(self, stage: str, metrics: dict[str, float]) -> None:
        with (self.run.path / "metrics.jsonl").open("a") as rows:
            rows.write(json.dumps({"stage": stage, **metrics}) + "\n")


class Learners:
    """As much of a learner group as these stages use: gives these rows, an error among them is raised."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows
        self.given: tuple[Any, ...] = ()
        self.is_shut_down = False

    async def start(self, session: Session, *args: Any) -> Learners:
        self.given = args
        return self

    async def train(self) -> AsyncIterator[dict[str, float]]:
        for row in self._rows:
            if isinstance(row, Exception):
                raise row
            yield row

    async def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """`start(*overrides)`: a session on a run directory; tasks run in this process."""

    async def in_process(
        function: Callable[..., Iterator[Any]], *args: Any, name: str, log_path: Path, **kwargs: Any
    ) -> AsyncIterator[Any]:
        for resource in ("num_cpus", "num_gpus"):
            kwargs.pop(resource, None)
        for item in function(*args, **kwargs):
            yield item

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervised, "stream_task", in_process)
    (tmp_path / "run.toml").write_text(RUN)

    def make(*overrides: str) -> Session:
        config = load_run_config(tmp_path / "run.toml", overrides)
        with open_run(config, tmp_path / "run") as run:
            return Session(config, run)

    return make


def write_prompts(prompts: list[Any]) -> None:
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


async def test_texts_are_read_without_a_tokenizer(start: Callable[..., Session]) -> None:
    write_prompts(["ab", "abcdefgh"])
    session = start()
    assert [row["prompt"] for row in await supervised.prompt_rows(session, "prompts")] == ["ab", "abcdefgh"]
    assert (session.notes, session.run.summary()) == ([], {})


@pytest.mark.parametrize("long_prompts", ["error", "drop"])
async def test_broken_prompts_are_left_out_counted_and_listed_where_that_is_wanted(
    start: Callable[..., Session], long_prompts: str
) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab", None, "abc"])
    session = start("data.broken_rows = 'skip'", f"rollout_actors.long_prompts = '{long_prompts}'")
    assert [row["prompt"] for row in await supervised.prompt_rows(session, "prompts")] == ["ab", "abc"]
    assert session.run.summary()["data"]["prompts"]["num_broken"] == 1
    assert session.notes == ["prompts: 1 broken rows left out (see logs/broken_rows_prompts.txt)"]
    listed = (session.run.path / "logs" / "broken_rows_prompts.txt").read_text()
    assert listed == "prompts.jsonl, line 2: column 'prompt': not text but None\n"


async def test_long_prompts_are_left_out_counted_and_told(start: Callable[..., Session]) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab", "abcdefgh", "abc"])
    session = start("rollout_actors.long_prompts = 'drop'")
    assert [row["prompt"] for row in await supervised.prompt_rows(session, "prompts")] == ["ab", "abc"]
    assert session.run.summary() == {"data": {"prompts": {"num_prompts": 2, "num_dropped": 1}}}
    told = "prompts: 1 of 3 prompts are longer than rollout_actors.max_prompt_tokens (6): left out"
    assert session.notes == [told]


async def test_conversations_are_rendered_before_anything_is_sampled(start: Callable[..., Session]) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts([[user("ab")], [user("abcdef")]])
    with pytest.raises(InputError, match=r"the prompt of prompts.jsonl, line 1 has 7 tokens, more than 6"):
        await supervised.prompt_rows(start(), "prompts")
    write_prompts([[user("a")]])
    assert await supervised.prompt_rows(start(), "prompts") == [{"prompt": "<bos>[user]a<eos>\n[assistant]"}]


def checkpoint(session: Session, stage: str, step: int) -> Path:
    path = session.run.path / "checkpoints" / stage / f"step-{step:06d}"
    path.mkdir(parents=True)
    return path


async def test_counts_go_to_the_summary_and_a_stage_that_goes_on_records_no_step_twice(
    start: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    learners = Learners(
        [
            {"num_examples": 7, "num_cut": 2, "num_dropped": 1, "num_held_out": 1},
            *({"step": float(step), "loss": 1.0} for step in (3, 4, 5)),
            {"held_out_loss": 0.5, "best_step": 4.0},
        ]
    )
    monkeypatch.setattr(supervised, "_start_learners", learners.start)
    session = start()
    for step in (1, 2, 3):
        session.log_step("sft", {"step": step})
    checkpoint(session, "sft", 4)
    await supervised.run_sft(session)
    data, output = [Source(Path("sft.jsonl"))], session.run.path / "sft"
    task = supervised.Supervised("sft", "sft", model=Path("model"), data=data, output=output)
    assert (learners.given, learners.is_shut_down) == ((task,), True)
    assert [row["step"] for row in session.run.metrics()] == [1, 2, 3, 4, 5]
    assert session.run.summary()["sft"] == {
        "num_examples": 7,
        "num_cut": 2,
        "num_dropped": 1,
        "num_held_out": 1,
        "held_out_loss": 0.5,
        "best_step": 4.0,
    }
    assert session.notes == [
        "sft: goes on after step 4",
        "sft: 7 examples kept, 2 of them cut, 1 dropped",
        "sft: held-out loss 0.5000 at step 4, kept",
    ]


async def test_learners_are_ended_when_a_stage_fails(
    start: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    learners = Learners([{"step": 1.0, "loss": 1.0}, LearnerError("learner-1", "gone")])
    monkeypatch.setattr(supervised, "_start_learners", learners.start)
    session = start()
    with pytest.raises(LearnerError, match="learner-1: gone"):
        await supervised.run_sft(session)
    assert learners.is_shut_down
    assert [row["step"] for row in session.run.metrics()] == [1]


def test_the_checkpoints_of_a_stage_go_once_its_artefact_is_there(start: Callable[..., Session]) -> None:
    session = start()
    sft, ppo = checkpoint(session, "sft", 4), checkpoint(session, "ppo", 4)
    start()
    assert sft.exists()
    (session.run.path / "sft").mkdir()
    (session.run.path / "sft" / "config.json").write_text("{}")
    start()
    assert (sft.exists(), ppo.exists()) == (False, True)


SEVERAL = """
[run]
name = "several"
stages = ["sft", "ppo"]
[model]
builder = "tests.deploy.stages.test_stages:build"
[tasks.sums]
weight = 2.0
sft = "sft.jsonl"
prompts = "prompts.jsonl"
scorer = "tests.support.scorers:length"
[tasks.facts]
builder = "tests.deploy.stages.test_stages:build"
scorer = "tests.support.scorers:length"
[tasks.talk]
scorer = "none"
[tasks.talk.environment]
path = "tests.support.environments:Echo"
"""


def build(directory: Path, *, seed: int) -> None:
    (directory / "prompts.parquet").write_text(f"built with {seed}")


async def test_each_tasks_data_are_built_in_a_folder_of_its_own_and_its_demonstrations_mixed_by_its_weight(
    start: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run.toml").write_text(SEVERAL)
    session, learners = start(), Learners([])
    await supervised.prepare(session)
    assert sorted(path.name for path in (session.run.path / "data").iterdir()) == ["facts"]
    assert (session.run.path / "data" / "facts" / "prompts.parquet").read_text() == "built with 0"
    monkeypatch.setattr(supervised, "_start_learners", learners.start)
    await supervised.run_sft(session)
    facts = session.run.path / "data" / "facts" / "sft.parquet"
    assert learners.given[0].data == [Source(Path("sft.jsonl"), 2.0), Source(facts, 1.0)]


async def test_every_tasks_prompts_are_read_and_those_of_an_environment_say_nothing(
    start: Callable[..., Session],
) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab", "abcdefgh"])
    facts = (
        '[tasks.facts]\nbuilder = "tests.deploy.stages.test_stages:build"\nscorer = "tests.support.scorers:length"\n'
    )
    text = SEVERAL.replace(facts, "").replace('builder = "tests.deploy.stages.test_stages:build"', 'path = "model"')
    Path("run.toml").write_text(text)
    session = start("rollout_actors.long_prompts = 'drop'", "rollout_actors.max_prompt_tokens = 6")
    assert await supervised.task_prompts(session) == [
        TaskPrompts("sums", [{"prompt": "ab"}], 2.0),
        TaskPrompts("talk", [{"prompt": ""}], 1.0),
    ]
    assert session.run.summary()["data"]["sums"]["prompts"] == {"num_prompts": 1, "num_dropped": 1}


async def test_the_scorer_of_every_task_is_tried_with_its_own_first_prompt(
    start: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def try_scorers(trials: list[Trial], *, timeout_s: float) -> Iterator[int]:
        tried.append([(trial.paths, trial.request.prompt) for trial in trials])
        yield 2

    monkeypatch.setattr(supervised, "try_scorers", try_scorers)
    Path("run.toml").write_text(SEVERAL)
    write_prompts(["ab"])
    await supervised.try_functions(start())
    both = [(task, "tests.support.scorers:length", prompt) for task, prompt in (("sums", "ab"), ("facts", ""))]
    together = [({f"tasks.{task}.scorer": path}, prompt) for task, path, prompt in both]
    assert tried == [together], "in one process, all of them"


async def test_a_broken_environment_of_any_task_is_named_before_anything_is_loaded(
    start: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "try_scorers", lambda trials, *, timeout_s: iter([]))
    Path("run.toml").write_text(SEVERAL)
    write_prompts(["ab"])
    broken = 'tasks.talk.environment = { path = "tests.support.environments:Odd", settings = { how = "raises" } }'
    with pytest.raises(InputError, match="no luck"):
        await supervised.try_functions(start(broken))
