"""A run whose texts become messages: all stages and `antiphon chat` write the same conversations for the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.data.chat_settings import ChatSettings
from cluster.data.tokenizer import load_tokenizer
from tests.support.chat import TEMPLATE, make_tokenizer, write_chat_model
from tests.support.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
OWN = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%Y') }}:")
RUN = """
[run]
stages = ["sft", "preferences", "reward_model", "ppo", "evaluation"]
[model]
path = "model"
chat_template = "own.jinja"
[data]
sft = "sft.jsonl"
prompts = "prompts.jsonl"
as_messages = true
system_prompt = "be"
[rollout_actors]
responses_per_prompt = 2
max_prompt_tokens = 40
max_response_tokens = 8
[trajectory_queue]
groups_per_step = 2
[reward_service]
scorer = "reward_model"
[sft]
num_steps = 1
[preferences]
num_pairs = 12
num_held_out_pairs = 0
annotator = "tests.support.chat:prefer_the_first"
[reward_model]
num_steps = 1
[learner]
num_steps = 1
num_minibatches = 1
[evaluation]
num_prompts = 2
"""


def antiphon(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_stage_writes_the_same_conversations(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "model", hidden_size=64)
    (tmp_path / "own.jinja").write_text(OWN)
    (tmp_path / "run.toml").write_text(RUN)
    letters = "abcdefgh"
    write_rows(tmp_path / "sft.jsonl", [{"prompt": letter, "completion": "x"} for letter in letters])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": letter + "<eos>"} for letter in letters])
    done = antiphon("train", str(tmp_path / "run.toml"), "--runs-dir", str(tmp_path), "--name", "run")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    kept = ChatSettings.of(run / "model")
    assert (kept.system_prompt, kept.as_messages, kept.date is not None) == ("be", True, True)
    for model in ("sft", "reward_model", "policy"):
        assert load_tokenizer(run / model).chat_settings == kept
        assert load_tokenizer(run / model).chat_template == OWN
    answers = pq.read_table(next((run / "evaluation").glob("*.parquet"))).to_pylist()
    year = str(kept.date)[:4]
    prompts = [f"<bos>{year}:[system]be<eos>\n[user]{letter}<eos><eos>\n[assistant]" for letter in letters]
    assert {answer["prompt"] for answer in answers} <= set(prompts)
    pairs = pq.read_table(run / "preferences.parquet").to_pylist()
    assert {pair["prompt"] for pair in pairs} <= set(prompts)
    spelled = [[pair["prompt"][start:end] for start, end in pair["prompt_literals"]] for pair in pairs]
    assert spelled == [["<eos>"]] * len(pairs)
    chat = antiphon("chat", str(run), "--prompt", "ab")
    assert chat.returncode == 0, chat.stderr


def test_a_template_makes_a_base_model_speak(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model", template=None)
    assert make_tokenizer(None).chat_template is None
    (tmp_path / "run.toml").write_text(RUN.replace('"own.jinja"', "'{{ messages }}'"))
    write_rows(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "x"}])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    checked = antiphon("check", str(tmp_path / "run.toml"))
    assert checked.returncode == 0, checked.stderr
    assert "wrapped as messages" in checked.stdout
    (tmp_path / "run.toml").write_text(RUN.replace('chat_template = "own.jinja"', ""))
    refused = antiphon("check", str(tmp_path / "run.toml"))
    assert refused.returncode == 2
    assert f"the tokenizer of {folder} has no chat template: set model.chat_template" in refused.stderr
