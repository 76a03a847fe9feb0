"""The stages before PPO: what they record and report of their data. Tasks run in this process."""

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
from deploy.data.prompts import prompt_rows, rendered_rows, screen_prompts, task_prompts
from deploy.run.directory import RunDirectory
from deploy.run.open import open_run
from deploy.stages.prepare import check_built_model, prepare, try_functions
from deploy.stages.sft import run_sft
from deploy.stages.supervised import Supervised
from reward_service.scorers.trial import try_functions as try_scorers
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
    """The part of a session that these stages use; `tasks` lists the functions run in a separate process."""

    def __init__(self, config: RunConfig, run: RunDirectory) -> None:
        self.config, self.run = config, run
        self.notes: list[str] = []
        self.tasks: list[tuple[Any, ...]] = []
        self.view = SimpleNamespace(note=self.notes.append, stage=lambda *_: None)

    async def run_task(
        self, function: Callable[..., Iterator[Any]], *args: Any, name: str, log_name: str = "", **kwargs: Any
    ) -> list[Any]:
        self.tasks.append((function, *args))
        return list(function(*args, **kwargs)) if function is not try_scorers else []

    def log_step(self, stage: str, metrics: dict[str, float]) -> None:
        with (self.run.path / "metrics.jsonl").open("a") as rows:
            rows.write(json.dumps({"stage": stage, **metrics}) + "\n")


class Learners:
    """A learner group that yields the given rows; an error among them is raised."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows
        self.is_shut_down = False

    async def start(self, session: Any, task: Supervised) -> Learners:
        self.task = task
        return self

    async def train(self) -> AsyncIterator[dict[str, float]]:
        for row in self._rows:
            if isinstance(row, Exception):
                raise row
            yield row

    async def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`start(*overrides)` opens a session on a run directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)

    def make(*overrides: str) -> Session:
        config = load_run_config(tmp_path / "run.toml", overrides)
        with open_run(config, tmp_path / "run") as run:
            return Session(config, run)

    return make


def write_prompts(prompts: list[Any]) -> None:
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


async def test_texts_that_surely_fit_are_read_without_a_tokenizer(start: Callable[..., Any]) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab", "abc"])
    session = start()
    assert [row["prompt"] for row in await prompt_rows(session, "prompts")] == ["ab", "abc"]
    assert (session.tasks, session.notes, session.run.summary()) == ([], [], {})


@pytest.mark.parametrize("name", ["prompts", "evaluation"])
async def test_a_long_prompt_ends_the_run_before_anything_is_loaded(start: Callable[..., Any], name: str) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab"] * 5)
    Path("evaluation.jsonl").write_text(Path("prompts.jsonl").read_text())
    with Path(f"{name}.jsonl").open("a") as lines:
        lines.write(json.dumps({"prompt": "abcdefgh"}) + "\n")
    session = start("data.evaluation = 'evaluation.jsonl'")
    with pytest.raises(InputError, match=rf"the prompt of {name}.jsonl, line 6 has 9 tokens, more than 6"):
        await screen_prompts(session, ["prompts", "evaluation"])


async def test_a_resumed_run_encodes_no_prompt_again(start: Callable[..., Any]) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts([[user("a")], [user("ab")]])
    first = start("rollout_actors.max_prompt_tokens = 8")
    rows = await prompt_rows(first, "prompts")
    resumed = start("rollout_actors.max_prompt_tokens = 8")
    assert await prompt_rows(resumed, "prompts") == rows
    assert (len(first.tasks), resumed.tasks) == (1, [])
    write_prompts([[user("b")], [user("ab")]])
    assert await prompt_rows(resumed, "prompts") != rows
    assert len(resumed.tasks) == 1


@pytest.mark.parametrize("long_prompts", ["error", "drop"])
async def test_broken_prompts_are_left_out_and_listed_if_they_may_be(
    start: Callable[..., Any], long_prompts: str
) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab", None, "abc"])
    session = start("data.broken_rows = 'skip'", f"rollout_actors.long_prompts = '{long_prompts}'")
    assert [row["prompt"] for row in await prompt_rows(session, "prompts")] == ["ab", "abc"]
    assert session.run.summary()["data"]["prompts"]["num_broken"] == 1
    assert session.notes == ["prompts: 1 broken rows left out (see logs/broken_rows_prompts.txt)"]
    listed = (session.run.path / "logs" / "broken_rows_prompts.txt").read_text()
    assert listed == "prompts.jsonl, line 2: column 'prompt': expected text, got None\n"


async def test_long_prompts_are_left_out_and_reported(start: Callable[..., Any]) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab", "abcdefgh", "abc"])
    session = start("rollout_actors.long_prompts = 'drop'")
    assert [row["prompt"] for row in await prompt_rows(session, "prompts")] == ["ab", "abc"]
    assert session.run.summary() == {"data": {"prompts": {"num_prompts": 2, "num_dropped": 1}}}
    assert session.notes == ["prompts: 1 of 3 prompts are longer than rollout_actors.max_prompt_tokens (6): left out"]


async def test_broken_rows_are_counted_once_if_prompts_are_altered_too(start: Callable[..., Any]) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab", None, "abcdefgh"])
    session = start(
        "data.broken_rows = 'skip'",
        "rollout_actors.long_prompts = 'drop'",
        "adversarial.ways = ['typos']",
        "data.adversarial_share = 0.5",
    )
    assert len(await prompt_rows(session, "prompts", altered_share=0.5)) == 1
    counts = {"num_broken": 1, "num_prompts": 1, "num_dropped": 1}
    assert session.run.summary()["data"]["prompts"] == counts


async def test_conversations_are_rendered_before_sampling(start: Callable[..., Any]) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts([[user("ab")], [user("abcdef")]])
    with pytest.raises(InputError, match=r"the prompt of prompts.jsonl, line 1 has 7 tokens, more than 6"):
        await prompt_rows(start(), "prompts")
    write_prompts([[user("a")]])
    rows = await prompt_rows(session := start(), "prompts")
    assert rows == [{"prompt": [user("a")]}]
    assert await rendered_rows(session, rows) == [{"prompt": "<bos>[user]a<eos>\n[assistant]"}]


def checkpoint(session: Session, stage: str, step: int) -> Path:
    path = session.run.path / "checkpoints" / stage / f"step-{step:06d}"
    path.mkdir(parents=True)
    return path


async def test_a_resumed_stage_records_no_step_twice(
    start: Callable[..., Any],
) -> None:
    learners = Learners(
        [
            {"num_examples": 7, "num_cut": 2, "num_dropped": 1, "num_held_out": 1},
            *({"step": float(step), "loss": 1.0} for step in (3, 4, 5)),
            {"held_out_loss": 0.5, "best_step": 4.0},
        ]
    )
    session = start()
    for step in (1, 2, 3):
        session.log_step("sft", {"step": step})
    checkpoint(session, "sft", 4)
    await run_sft(session, start=learners.start)
    data, output = [Source(Path("sft.jsonl"))], session.run.path / "sft"
    task = Supervised("sft", "sft", model=Path("model"), data=data, output=output)
    assert (learners.task, learners.is_shut_down) == (task, True)
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
        "sft: resumes after step 4",
        "sft: 7 examples kept, 2 of them cut, 1 dropped",
        "sft: held-out loss 0.5000 at step 4, kept",
    ]


async def test_learners_are_shut_down_if_a_stage_fails(
    start: Callable[..., Any],
) -> None:
    learners = Learners([{"step": 1.0, "loss": 1.0}, LearnerError("learner-1", "gone")])
    session = start()
    with pytest.raises(LearnerError, match="learner-1: gone"):
        await run_sft(session, start=learners.start)
    assert learners.is_shut_down
    assert [row["step"] for row in session.run.metrics()] == [1]


def test_checkpoints_of_a_supervised_stage_go_once_it_is_done(start: Callable[..., Any]) -> None:
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


async def test_each_task_has_its_own_data_folder_and_weight_in_sft(
    start: Callable[..., Any],
) -> None:
    Path("run.toml").write_text(SEVERAL)
    session, learners = start(), Learners([])
    await prepare(session)
    assert sorted(path.name for path in (session.run.path / "data").iterdir()) == ["facts"]
    assert (session.run.path / "data" / "facts" / "prompts.parquet").read_text() == "built with 0"
    await run_sft(session, start=learners.start)
    facts = session.run.path / "data" / "facts" / "sft.parquet"
    assert learners.task.data == [Source(Path("sft.jsonl"), 2.0), Source(facts, 1.0)]


async def test_prompts_of_every_task_are_read_and_empty_for_an_environment(
    start: Callable[..., Any],
) -> None:
    make_tokenizer().save_pretrained("model")
    write_prompts(["ab", "abcdefgh"])
    facts = (
        '[tasks.facts]\nbuilder = "tests.deploy.stages.test_stages:build"\nscorer = "tests.support.scorers:length"\n'
    )
    text = SEVERAL.replace(facts, "").replace('builder = "tests.deploy.stages.test_stages:build"', 'path = "model"')
    Path("run.toml").write_text(text)
    session = start("rollout_actors.long_prompts = 'drop'", "rollout_actors.max_prompt_tokens = 6")
    assert await task_prompts(session) == [
        TaskPrompts("sums", [{"prompt": "ab"}], 2.0),
        TaskPrompts("talk", [{"prompt": ""}], 1.0),
    ]
    assert session.run.summary()["data"]["sums"]["prompts"] == {"num_prompts": 1, "num_dropped": 1}


async def test_each_tasks_scorer_is_tried_with_its_first_prompt(start: Callable[..., Any]) -> None:
    Path("run.toml").write_text(SEVERAL)
    write_prompts(["ab"])
    session = start()
    await try_functions(session)
    ((function, trials),) = session.tasks
    assert function is try_scorers
    scorer = "tests.support.scorers:length"
    tried = [(trial.paths, trial.request.prompt) for trial in trials]
    assert tried == [({"tasks.sums.scorer": scorer}, "ab"), ({"tasks.facts.scorer": scorer}, "")]


async def test_the_scorers_trial_has_messages_and_completion_ids(start: Callable[..., Any]) -> None:
    messages = [{"role": "user", "content": "ab"}]
    talk = 'tasks.talk.scorer = "tests.support.scorers:length"'
    Path("run.toml").write_text(SEVERAL)
    write_prompts([messages])
    session = start(talk)
    await try_functions(session)
    ((_, trials),) = session.tasks
    by_key = {key: dict(trial.request.columns) for trial in trials for key in trial.paths}
    assert [columns.pop("trainer_state") for columns in by_key.values()] == [{"global_step": 0, "max_steps": 100}] * 3
    assert by_key["tasks.sums.scorer"] == {"messages": messages, "completion_ids": [], "finish_reason": "stop"}
    assert by_key["tasks.talk.scorer"]["messages"] == by_key["tasks.talk.scorer"]["conversation"][:1]


async def test_a_broken_environment_is_named_before_any_scorer_is_tried(start: Callable[..., Any]) -> None:
    Path("run.toml").write_text(SEVERAL)
    write_prompts(["ab"])
    broken = 'tasks.talk.environment = { path = "tests.support.environments:Odd", settings = { how = "raises" } }'
    session = start(broken)
    with pytest.raises(InputError, match="no luck"):
        await try_functions(session)
    assert session.tasks == []


def build_model(directory: Path, *, seed: int) -> None:
    make_tokenizer().save_pretrained(directory)
    settings = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "model.safetensors").touch()


async def test_the_context_of_a_built_model_is_checked(start: Callable[..., Any]) -> None:
    Path("run.toml").write_text(RUN.replace('path = "model"', f'builder = "{__name__}:build_model"'))
    session: Any = start("rollout_actors.max_response_tokens = 123")
    await prepare(session)
    with pytest.raises(InputError, match=r"6 max_prompt_tokens \+ 123 = 129 tokens, but .* is 128"):
        check_built_model(session)
    session.config = load_run_config(Path("run.toml"), ["rollout_actors.max_response_tokens = 121"])
    check_built_model(session)
