"""Supervised fine-tuning learns its data, is reproducible bit for bit, and reports wrong input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.data.datasets import Source
from cluster.errors import InputError
from examples.reviews.model import build_model
from learner.config import LearnerConfig, SftConfig
from learner.learning_rates import default_learning_rate
from learner.model.tokenizer import load_tokenizer
from learner.place import Place
from learner.supervised.batches import mixed_batches, shuffled_batches
from learner.supervised.examples import Completion, tokenize
from learner.supervised.loop import Row
from learner.supervised.rank import SupervisedSettings, load_net
from learner.supervised.sft import completion_nll
from tests.support.chat import assistant, user, write_chat_model
from tests.support.supervised_ranks import CPU, stream

PROMPTS = ["we tried the new film on friday night:", "i tried the old book on sunday morning:"]
COMPLETIONS = ["the film was good and lovely.", "the book was dull, the plot was bad."]
ROWS = {"prompt": PROMPTS, "completion": COMPLETIONS}
CONFIG = SftConfig(num_steps=40, batch_size=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sft") / "model"
    build_model(path, seed=0)
    return path


def train_sft(model: Path, data: Path, output: Path, config: SftConfig, *, seed: int) -> Iterator[Row]:
    return stream(SupervisedSettings(LearnerConfig(), config, Place(model, seed=seed), (Source(data),), output))


def written(path: Path, columns: dict[str, list[str]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def greedy(model_path: Path, prompt: str) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    text: str = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_a_trained_folder_completes_its_prompts_and_stops(model_path: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "sft.parquet", ROWS)
    counts, *metrics, last = train_sft(model_path, data, tmp_path / "out", CONFIG, seed=0)
    expected = {"num_examples": 2, "num_cut": 0, "num_dropped": 0, "num_held_out": 0}
    assert (counts, last) == (expected | {"num_steps": 40, "learning_rate": 1e-2}, {})
    assert [m["step"] for m in metrics] == list(range(1, 41))
    assert metrics[0]["loss"] > 3 > 0.1 > metrics[-1]["loss"]
    assert all(m["tokens_per_s"] > 0 for m in metrics)
    assert [greedy(tmp_path / "out", prompt) for prompt in PROMPTS] == COMPLETIONS
    assert (tmp_path / "out/generation_config.json").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_seed_gives_the_same_weights_from_parquet_and_json(model_path: Path, tmp_path: Path) -> None:
    parquet = written(tmp_path / "sft.parquet", ROWS)
    lines = tmp_path / "sft.jsonl"
    lines.write_text(
        "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
    )
    config = SftConfig(num_steps=3, batch_size=1)
    for name, data, seed in (("a", parquet, 0), ("b", lines, 0), ("c", parquet, 1)):
        list(train_sft(model_path, data, tmp_path / name, config, seed=seed))
    first, second, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second != other


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_over_all_completion_tokens(model_path: Path, packing: bool) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    batch = [*tokenize(tokenizer, PROMPTS, COMPLETIONS), Completion([5, 6, 7], 0), Completion([5], 0)]
    total = 0.0
    for ids, start, _ in batch:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        start = max(1, start)
        total += F.cross_entropy(
            logits[start - 1 : -1], torch.tensor(ids[start:], dtype=torch.long), reduction="sum"
        ).item()
    config = LearnerConfig(packing=packing)
    net: Any = load_net(SupervisedSettings(config, CONFIG, Place(model_path), (Source(Path("data")),), Path("out")))
    assert completion_nll(net, batch, CPU).item() == pytest.approx(total, rel=1e-6)
    assert completion_nll(net, [], CPU).item() == 0


def test_the_old_output_stays_until_training_is_done(model_path: Path, tmp_path: Path) -> None:
    data, output = written(tmp_path / "sft.parquet", ROWS), tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    training = train_sft(model_path, data, output, SftConfig(num_steps=2, batch_size=2), seed=0)
    next(training)
    assert [path.name for path in output.iterdir()] == ["old"]
    list(training)
    assert not (output / "old").exists()
    assert (output / "model.safetensors").is_file()


def test_steps_and_learning_rate_follow_epochs_and_size_unless_set(model_path: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "sft.parquet", ROWS)
    config = SftConfig(num_epochs=2, batch_size=3)
    counts, *rows, _ = train_sft(model_path, data, tmp_path / "out", config, seed=0)
    assert counts["num_steps"] == len(rows) == 2 * math.ceil(len(ROWS["prompt"]) / 3)
    assert counts["learning_rate"] == default_learning_rate("sft", num_weights(model_path))
    fixed = SftConfig(num_steps=1, learning_rate=0.5)
    counts, *rows, _ = train_sft(model_path, data, tmp_path / "fixed", fixed, seed=0)
    assert (counts["num_steps"], counts["learning_rate"], len(rows)) == (1, 0.5, 1)


def num_weights(folder: Path) -> int:
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": PROMPTS, "answer": COMPLETIONS}, "no column 'completion'; it has prompt, answer"),
        ({"prompt": [], "completion": []}, "the data set is empty"),
        ({"prompt": PROMPTS, "completion": ["fine", None]}, "row 1: column 'completion': expected text, got None"),
        (
            {"prompt": PROMPTS, "completion": ["fine", "good " * 200]},
            "row 1: 211 tokens, but the model's context is 128",
        ),
    ],
)
def test_an_input_error_names_file_and_fault_of_wrong_data(
    model_path: Path, tmp_path: Path, columns: dict[str, list[str]], message: str
) -> None:
    data = written(tmp_path / "sft.parquet", columns)
    with pytest.raises(InputError) as error:
        list(train_sft(model_path, data, tmp_path / "out", CONFIG, seed=0))
    assert str(error.value).startswith(str(data))
    assert str(error.value).endswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "text"), [("a.parquet", "text"), ("a.jsonl", "{not json"), ("b.jsonl", "")])
def test_an_unreadable_file_is_an_input_error(model_path: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=name):
        list(train_sft(model_path, tmp_path / name, tmp_path / "out", CONFIG, seed=0))


def test_a_model_folder_without_weights_or_tokenizer_is_an_input_error(model_path: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "sft.parquet", ROWS)
    for name, message in (
        ("tokenizer.json", "has no usable tokenizer"),
        ("model.safetensors", "no \\*.safetensors in the model folder"),
    ):
        folder = tmp_path / name
        shutil.copytree(model_path, folder)
        (folder / name).unlink()
        with pytest.raises(InputError, match=f"{folder}: {message}"):
            list(train_sft(folder, data, tmp_path / "out", CONFIG, seed=0))


def test_a_missing_model_or_data_set_is_an_input_error(model_path: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "sft.parquet", ROWS)
    with pytest.raises(InputError, match="nowhere: no model folder"):
        list(train_sft(tmp_path / "nowhere", data, tmp_path / "out", CONFIG, seed=0))
    with pytest.raises(InputError, match=r"none\.parquet: no such data set"):
        list(train_sft(model_path, tmp_path / "none.parquet", tmp_path / "out", CONFIG, seed=0))


def test_a_model_trained_on_conversations_keeps_its_chat_template(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model")
    rows = [{"messages": [user("ab"), assistant("cde")]}, {"messages": [user("ba"), assistant("edc")]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sft.parquet")
    config = SftConfig(num_steps=60, batch_size=2, learning_rate=2e-2)
    list(train_sft(folder, tmp_path / "sft.parquet", tmp_path / "out", config, seed=0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
        answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == row["messages"][1]["content"]


@pytest.mark.parametrize(("rule", "cut", "dropped"), [("cut", 1, 1), ("drop", 0, 2)])
def test_long_examples_are_cut_or_dropped_and_counted_before_training(
    model_path: Path, tmp_path: Path, rule: Literal["cut", "drop"], cut: int, dropped: int
) -> None:
    columns = {"prompt": [*PROMPTS, "good", "good " * 200], "completion": [*COMPLETIONS, "good " * 200, "bad"]}
    data = written(tmp_path / "sft.parquet", columns)
    config = SftConfig(num_steps=2, batch_size=4, long_examples=rule, max_tokens=64)
    counts, *_ = train_sft(model_path, data, tmp_path / "out", config, seed=0)
    assert [counts[f"num_{name}"] for name in ("examples", "cut", "dropped")] == [4 - dropped, cut, dropped]


def test_the_held_out_loss_is_of_examples_never_trained_on(model_path: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "sft.parquet", ROWS)
    config = SftConfig(num_steps=20, batch_size=1, learning_rate=1e-2, held_out_share=0.5, evaluate_every_steps=5)
    _, *steps, last = train_sft(model_path, data, tmp_path / "out", config, seed=0)
    assert [step["step"] for step in steps if "held_out_loss" in step] == [5, 10, 15, 20]
    net: Any = load_net(
        SupervisedSettings(LearnerConfig(), config, Place(tmp_path / "out"), (Source(data),), tmp_path / "out")
    )
    with torch.no_grad():
        losses = [
            completion_nll(net, [example], CPU).item() / (len(example.token_ids) - example.num_prompt)
            for example in tokenize(load_tokenizer(tmp_path / "out"), PROMPTS, COMPLETIONS)
        ]
    assert last["held_out_loss"] == pytest.approx(max(losses), abs=1e-5)


def test_sources_are_mixed_by_weight_each_in_shuffled_passes() -> None:
    def drawn(sizes: list[int], weights: list[float], num: int) -> list[list[int]]:
        return list(islice(mixed_batches(sizes, weights, 6, torch.Generator().manual_seed(3)), num))

    assert drawn([10], [2.0], 4) == list(islice(shuffled_batches(10, 6, torch.Generator().manual_seed(3)), 4))
    batches = drawn([4, 10], [1.0, 2.0], 10)
    assert {len(batch) for batch in batches} == {6}
    assert all(sum(row < 4 for row in batch) == 2 for batch in batches)
    rows = [row for batch in batches for row in batch]
    first, second = [row for row in rows if row < 4], [row for row in rows if row >= 4]
    assert [sorted(first[start : start + 4]) for start in range(0, 20, 4)] == [[0, 1, 2, 3]] * 5
    assert [sorted(second[start : start + 10]) for start in range(0, 40, 10)] == [list(range(4, 14))] * 4
    assert second[:10] != second[10:20]
    assert drawn([4, 10], [1.0, 2.0], 10) == batches


def test_sources_are_counted_together_and_held_out_separately(model_path: Path, tmp_path: Path) -> None:
    sources = tuple(
        Source(written(tmp_path / f"{i}.parquet", {"prompt": [prompt] * num, "completion": [completion] * num}))
        for i, (prompt, completion, num) in enumerate(zip(PROMPTS, COMPLETIONS, (4, 20), strict=True))
    )
    config = CONFIG.model_copy(update={"held_out_share": 0.25, "batch_size": 4})
    out = tmp_path / "out"
    counts, *_ = stream(SupervisedSettings(LearnerConfig(), config, Place(model_path), sources, out))
    assert (counts["num_examples"], counts["num_held_out"]) == (24, 6)
    assert [greedy(out, prompt).strip() for prompt in PROMPTS] == COMPLETIONS
