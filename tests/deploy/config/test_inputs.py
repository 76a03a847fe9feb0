"""Test `antiphon check`: errors in models, data sets and functions, and its speed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cluster.errors import InputError
from deploy.config.inputs import check_inputs
from deploy.config.load import load_run_config
from tests.support.chat import assistant, user
from tests.support.paths import ROOT

RUN = """
[run]
stages = ["sft", "ppo"]
[model]
path = "model"
[data]
sft = "sft.parquet"
prompts = "prompts.jsonl"
[rollout_actors]
max_prompt_tokens = 8
max_response_tokens = 8
[reward_service]
scorer = "package.scorers:length"
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task whose every file is right; its modules must never be imported."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    settings = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 16, "vocab_size": 3}
    (model / "config.json").write_text(json.dumps(settings))
    save_file({"model.embed_tokens.weight": np.zeros((3, 2), np.float32)}, model / "model.safetensors")
    Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")).save(str(model / "tokenizer.json"))
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "sft.parquet")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "scorers.py").write_text(
        "raise RuntimeError('imported')\ntry:\n    from x import fast\nexcept ImportError:\n    fast = None\n"
        "def length(prompts, responses, **columns): ...\n"
    )
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def refused(task: Path) -> str:
    with pytest.raises(InputError) as refusal:
        check_inputs(load_run_config(task / "run.toml"))
    return str(refusal.value)


def test_a_valid_task_is_described(task: Path) -> None:
    assert check_inputs(load_run_config(task / "run.toml")) == [
        "model        model (LlamaForCausalLM, 3 tokens, context 16)",
        "sft          sft.parquet (1 rows)",
        "prompts      prompts.jsonl (2 rows)",
        "scorer       package.scorers:length (package/scorers.py:6)",
    ]


def test_stages_that_train_every_weight_beside_adapters_are_described(task: Path) -> None:
    lines = check_inputs(load_run_config(task / "run.toml", ["learner.lora.rank = 4"]))
    assert lines[-1] == "lora         ppo trains adapters of rank 4; sft: every weight"


def test_a_bound_is_described_with_its_cost(task: Path) -> None:
    config = load_run_config(task / "run.toml", ['learner.constraint = { cost = "length", max_mean = 2.5 }'])
    assert check_inputs(config)[-1] == "constraint   mean of length at most 2.5"


@pytest.mark.process
def test_check_answers_in_two_seconds_without_torch_or_ray(task: Path) -> None:
    code = (
        "import sys, atexit\n"
        "heavy = ('torch', 'ray', 'transformers', 'datasets', 'vllm', 'tensorboard', 'package')\n"
        "atexit.register(lambda: print('imported:', [name for name in heavy if name in sys.modules]))\n"
        "sys.argv[1:] = ['check', 'run.toml']\n"
        "from deploy.cli import app\n"
        "app()\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert (done.returncode, done.stdout.splitlines()[-2:]) == (0, ["ok", "imported: []"]), done.stderr
    assert took_s < 2


def test_a_missing_model_folder_is_named(task: Path) -> None:
    (task / "model").rename(task / "elsewhere")
    assert refused(task) == "model.path: no such folder: model"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_or_broken_file_of_the_model_is_named(task: Path, name: str) -> None:
    (task / "model" / name).write_text("{")
    assert refused(task).startswith(f"model/{name}: not ")
    (task / "model" / name).unlink()
    assert refused(task) == f"model/{name}: missing"


def test_weights_that_are_not_safetensors_are_refused(task: Path) -> None:
    (task / "model" / "model.safetensors").rename(task / "model" / "pytorch_model.bin")
    assert refused(task).startswith("model: its weights are in pytorch_model.bin, a format that can run code")
    assert "AutoModelForCausalLM as M" in refused(task)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(task: Path) -> None:
    settings = {"max_position_embeddings": 16, "vocab_size": 2}
    (task / "model" / "config.json").write_text(json.dumps(settings))
    save_file({"model.embed_tokens.weight": np.zeros((2, 2), np.float32)}, task / "model" / "model.safetensors")
    what = "has tokens up to number 2, the model only 2: resize its embeddings to the tokenizer and save both"
    assert refused(task).startswith(f"model/tokenizer.json: {what}")


def test_a_vocabulary_padded_beyond_the_tokenizer_is_accepted(task: Path) -> None:
    settings = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 16, "vocab_size": 64}
    (task / "model" / "config.json").write_text(json.dumps(settings))
    save_file({"model.embed_tokens.weight": np.zeros((64, 2), np.float32)}, task / "model" / "model.safetensors")
    check_inputs(load_run_config(task / "run.toml"))


def test_an_adapter_as_the_model_is_refused_with_the_command_that_merges(task: Path) -> None:
    (task / "model" / "config.json").unlink()
    (task / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "base/model"}')
    assert refused(task).startswith("model: holds an adapter for base/model; merge the two once")
    assert "T.from_pretrained('base/model').save_pretrained('model-merged')" in refused(task)


def test_prompt_and_response_longer_than_the_context_are_refused(task: Path) -> None:
    run_file = task / "run.toml"
    run_file.write_text(run_file.read_text().replace("max_response_tokens = 8", "max_response_tokens = 9"))
    what = "8 max_prompt_tokens + 9 = 17 tokens, but max_position_embeddings of model is 16"
    assert refused(task) == f"rollout_actors.max_response_tokens: {what}"


def test_a_missing_column_is_named(task: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["b"]}), task / "sft.parquet")
    assert refused(task) == "sft.parquet: no column 'completion'; it has prompt, answer"


def test_columns_may_be_renamed_if_a_data_set_has_them(task: Path) -> None:
    pq.write_table(pa.table({"question": ["a"], "completion": ["b"]}), task / "sft.parquet")
    with (task / "run.toml").open("a") as run_file:
        run_file.write('\n[data.columns]\nprompt = "question"\n')
    assert check_inputs(load_run_config(task / "run.toml"))[1] == "sft          sft.parquet (1 rows)"
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), task / "sft.parquet")
    assert refused(task) == ("data.columns.prompt: no data set has a column 'question'; they have completion, prompt")


def test_a_column_that_is_not_text_is_named(task: Path) -> None:
    (task / "prompts.jsonl").write_text('{"prompt": 3}\n')
    assert refused(task) == "prompts.jsonl: column 'prompt' holds neither text nor messages of role and content"


@pytest.mark.parametrize("name", ["empty.parquet", "empty.jsonl"])
def test_an_empty_data_set_is_named(task: Path, name: str) -> None:
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), task / name)
    else:
        (task / name).touch()
    (task / "run.toml").write_text(RUN.replace("prompts.jsonl", name))
    assert refused(task) == f"{name}: the data set is empty"


def test_a_missing_data_set_is_named(task: Path) -> None:
    (task / "prompts.jsonl").unlink()
    assert refused(task) == "prompts.jsonl: no such data set"


def with_conversations(task: Path) -> None:
    """The task, its data sets now conversations: a saved data set, shards, JSON Lines, every form of each kind."""
    from datasets import Dataset, DatasetDict

    talk = [user("a"), assistant("b")]
    DatasetDict(train=Dataset.from_list([{"messages": talk}] * 2)).save_to_disk(task / "sft")
    (task / "prompts").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist([{"prompt": talk[:1], "n": 1}]), task / "prompts" / f"{name}.parquet")
    row = {"chosen": talk, "rejected": [talk[0], assistant("a")], "margin": 1.5}
    (task / "preferences.jsonl").write_text(json.dumps(row) + "\n")
    data = 'sft = "sft"\nprompts = "prompts"\npreferences = "preferences.jsonl"\nevaluation = "prompts/b.parquet"\n'
    (task / "run.toml").write_text(RUN.replace('sft = "sft.parquet"\nprompts = "prompts.jsonl"\n', data))


@pytest.mark.parametrize("holder", ["chat_template.jinja", "tokenizer_config.json"])
def test_conversations_in_every_form_are_described(task: Path, holder: str) -> None:
    with_conversations(task)
    text = "{{ messages }}" if holder.endswith(".jinja") else json.dumps({"chat_template": "{{ messages }}"})
    (task / "model" / holder).write_text(text)
    assert check_inputs(load_run_config(task / "run.toml"))[1:5] == [
        "sft          sft (2 rows of messages)",
        "prompts      prompts (2 rows of messages)",
        "preferences  preferences.jsonl (1 rows of messages)",
        "evaluation   prompts/b.parquet (1 rows of messages)",
    ]


def test_conversations_for_a_model_without_a_chat_template_are_refused(task: Path) -> None:
    with_conversations(task)
    (task / "model" / "tokenizer_config.json").write_text("{}")
    assert refused(task) == "sft: holds messages, but the tokenizer of model has no chat template"


SCORERS = """
[reward_service.scorers]
same = { kind = "exact" }
safe = { kind = "forbidden", path = "phrases.txt", function = "package.scorers:length" }
all = { kind = "composite", parts = { same = 1 }, gates = ["safe"] }
"""


def test_named_scorers_are_described_and_never_imported(task: Path) -> None:
    (task / "phrases.txt").write_text("x")
    (task / "run.toml").write_text(RUN + SCORERS)
    assert check_inputs(load_run_config(task / "run.toml"))[-4:] == [
        "scorers.safe.function package.scorers:length (package/scorers.py:6)",
        "scorers.same exact",
        "scorers.safe forbidden phrases.txt",
        "scorers.all composite of same, safe",
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('safe = { kind = "forbidden", path = "gone.txt" }', "gone.txt: cannot be read (No such file or directory)"),
        ('old = { kind = "reward_model", path = "gone" }', "reward_service.scorers.old.path: no reward model in gone"),
        (
            'mine = { kind = "function", path = "package.scorers:no" }',
            "reward_service.scorers.mine.path: package.scorers has no function 'no'",
        ),
    ],
)
def test_a_missing_part_of_a_named_scorer_is_named(task: Path, line: str, what: str) -> None:
    (task / "run.toml").write_text(f"{RUN}[reward_service.scorers]\n{line}\n")
    assert refused(task).startswith(what)


def test_every_tasks_data_and_functions_are_listed_and_a_wrong_one_named(task: Path) -> None:
    data = '[data]\nsft = "sft.parquet"\nprompts = "prompts.jsonl"\n'
    tasks = '[tasks.sums]\nsft = "sft.parquet"\nprompts = "prompts.jsonl"\nscorer = "package.scorers:length"\n'
    tasks += '[tasks.facts]\nprompts = "facts.jsonl"\nscorer = "package.scorers:fast"\n'
    (task / "facts.jsonl").write_text('{"prompt": "a"}\n')
    text = RUN.replace(data, "").replace('[reward_service]\nscorer = "package.scorers:length"\n', tasks)
    (task / "run.toml").write_text(text)
    assert check_inputs(load_run_config(task / "run.toml"))[1:] == [
        "sums.sft     sft.parquet (1 rows)",
        "sums.prompts prompts.jsonl (2 rows)",
        "facts.prompts facts.jsonl (1 rows)",
        "sums.scorer  package.scorers:length (package/scorers.py:6)",
        "facts.scorer package.scorers:fast (package/scorers.py:3)",
    ]
    (task / "facts.jsonl").write_text('{"question": "a"}\n')
    assert refused(task) == "facts.jsonl: no column 'prompt'; it has question"


def model_settings(task: Path, **settings: object) -> None:
    path = task / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "settings", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"text_config": {"dtype": "float16"}}]
)
def test_float16_weights_are_refused_unless_a_dtype_is_set(task: Path, settings: dict[str, object]) -> None:
    model_settings(task, **settings)
    assert refused(task) == 'model.dtype: the weights of model are float16: set it to "float32" or "bfloat16"'
    check_inputs(load_run_config(task / "run.toml", ['model.dtype = "float32"']))


def test_sequences_beyond_the_attention_window_are_refused_if_packed(task: Path) -> None:
    model_settings(task, sliding_window=15)
    what = "sequences may have 16 tokens, but the attention window of model is 15: set it false"
    assert refused(task) == f"learner.packing: {what}"
    check_inputs(load_run_config(task / "run.toml", ["learner.packing = false"]))


@pytest.mark.parametrize("settings", [{"sliding_window": 16}, {"sliding_window": 4, "use_sliding_window": False}])
def test_a_window_that_no_sequence_exceeds_is_accepted(task: Path, settings: dict[str, object]) -> None:
    model_settings(task, **settings)
    check_inputs(load_run_config(task / "run.toml"))


def test_a_seed_beyond_32_bits_is_refused(task: Path) -> None:
    with pytest.raises(InputError, match=r"run\.seed"):
        load_run_config(task / "run.toml", ["run.seed = 20251128161500"])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("max_num_seq = 8", "max_num_seq: vLLM has no engine argument of this name (did you mean max_num_seqs?)"),
        ('logprobs_mode = "raw_logits"', "logprobs_mode: is set by the rollout actor"),
    ],
)
def test_engine_arguments_that_vllm_does_not_take_are_refused(task: Path, line: str, error: str) -> None:
    (task / "run.toml").write_text(RUN + f"[rollout_actors.engine]\n{line}\n")
    assert refused(task).startswith(f"rollout_actors.engine.{error}")
