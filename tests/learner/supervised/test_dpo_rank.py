"""A rank of DPO and KTO: its reference, adapters, tiny policies that learn the preference, and long rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.data.datasets import Source
from cluster.errors import InputError
from learner.config import LearnerConfig, LoraConfig
from learner.dpo_config import DpoConfig
from learner.supervised.loop import Row
from learner.supervised.rank import SupervisedSettings
from tests.learner.supervised.test_examples import written
from tests.support.supervised_ranks import interrupted_after, make_rank, settings, stream, untimed, write_inputs

NUM_ROWS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("dpo"), NUM_ROWS)


def all_rows(rank_settings: SupervisedSettings) -> list[Row]:
    rank = make_rank(rank_settings)
    rows = [rank.counts()]
    while more := rank.advance(3):
        rows += more
    return [*rows, rank.finish()]


def kept_table(rank_settings: SupervisedSettings) -> Any:
    assert rank_settings.reference_path is not None
    (path,) = rank_settings.reference_path.iterdir()
    return load_file(path)["logprobs"]


@torch.no_grad()
def plain_logprob(model: Any, ids: Sequence[int], num_prompt: int) -> float:
    """Sum a completion's log-probabilities by transformers."""
    tokens = torch.tensor([list(ids)])
    logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return float(logprobs[num_prompt - 1 :].sum())


def test_the_reference_is_the_starting_model_by_transformers(folder: Path, tmp_path: Path) -> None:
    rank_settings = settings(folder, "dpo", tmp_path)
    rank = make_rank(rank_settings)
    (progress,) = rank.advance(1)
    assert progress == {"num_reference": NUM_ROWS, "num_rows": NUM_ROWS}
    rank.advance(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    rows = [*rank._training, *rank._held_out]
    expected = [[plain_logprob(model, side.token_ids, side.num_prompt) for side in row.completions] for row in rows]
    torch.testing.assert_close(kept_table(rank_settings).float(), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("stage", "first"), [("dpo", math.log(2)), ("kto", 0.5)])
def test_the_first_loss_is_that_of_the_reference_itself(folder: Path, tmp_path: Path, stage: str, first: float) -> None:
    rows = all_rows(settings(folder, stage, tmp_path))
    losses = [row["loss"] for row in rows if "step" in row]
    assert losses[0] == pytest.approx(first, abs=1e-4)
    assert losses[-1] < losses[0]


def test_the_reference_is_computed_once_for_the_same_data_and_model(folder: Path, tmp_path: Path) -> None:
    rank_settings = settings(folder, "kto", tmp_path)
    first, again = all_rows(rank_settings), all_rows(rank_settings)
    assert [row for row in first if "num_reference" in row]
    assert untimed(again) == untimed([row for row in first if "num_reference" not in row])
    weights = (rank_settings.output_path / "model.safetensors").read_bytes()
    other = replace(rank_settings, place=replace(rank_settings.place, dtype="bfloat16"))
    assert [row for row in all_rows(other) if "num_reference" in row]
    assert rank_settings.reference_path is not None
    assert len(list(rank_settings.reference_path.iterdir())) == 2
    all_rows(rank_settings)
    assert (rank_settings.output_path / "model.safetensors").read_bytes() == weights


def test_a_damaged_file_of_the_reference_is_named(folder: Path, tmp_path: Path) -> None:
    rank_settings = settings(folder, "dpo", tmp_path)
    all_rows(rank_settings)
    assert rank_settings.reference_path is not None
    (path,) = rank_settings.reference_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read: delete it") as error:
        all_rows(rank_settings)
    assert error.value.where == str(path)


def test_a_stage_killed_while_it_computes_the_reference_starts_it_again(folder: Path, tmp_path: Path) -> None:
    rank_settings, whole = settings(folder, "dpo", tmp_path), settings(folder, "dpo", tmp_path / "whole")
    make_rank(rank_settings).advance(1)
    assert rank_settings.reference_path is not None
    assert not rank_settings.reference_path.exists()
    assert untimed(all_rows(rank_settings)) == untimed(all_rows(whole))


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_only_adapters_are_trained_and_the_reference_has_none(folder: Path, tmp_path: Path, stage: str) -> None:
    rank_settings = settings(folder, stage, tmp_path)
    rank_settings = replace(rank_settings, config=LearnerConfig(lora=LoraConfig(rank=2)))
    rank_settings = replace(rank_settings, stage=rank_settings.stage.model_copy(update={"learning_rate": 1e-2}))
    plain = settings(folder, stage, tmp_path / "plain")
    all_rows(plain)
    interrupted_after(stream(rank_settings), 4)
    losses = [row["loss"] for row in stream(rank_settings) if "loss" in row]
    torch.testing.assert_close(kept_table(rank_settings), kept_table(plain), atol=1e-4, rtol=0)
    start, trained = (load_file(path / "model.safetensors") for path in (folder / "model", rank_settings.output_path))
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert changed
    assert all("proj" in name for name in changed), "embeddings and norms are frozen"
    assert losses[-1] < losses[0]
    assert (rank_settings.output_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kto"])
def test_a_policy_learns_to_write_what_was_chosen(folder: Path, tmp_path: Path, loss: Any) -> None:
    words = {"good": ("fine", "dull"), "bad": ("poor", "nice"), "new": ("okay", "grim")}
    rows = [{"prompt": prompt, "chosen": c, "rejected": r} for prompt, (c, r) in words.items()]
    data = written(tmp_path / "pairs.jsonl", *rows)
    rates = {"sigmoid": 1e-2, "ipo": 1e-2, "kto": 1e-2}
    stage = DpoConfig(loss=loss, num_steps=25, batch_size=6, learning_rate=rates[loss], held_out_share=0.0)
    rank_settings = replace(
        settings(folder, "dpo", tmp_path), stage=stage, sources=(Source(data),), checkpoints_path=None
    )
    last = [row for row in stream(rank_settings) if "step" in row][-1]
    assert last["accuracy"] == 1.0
    assert last["rewards/margins"] > 0.1
    tokenizer = AutoTokenizer.from_pretrained(rank_settings.output_path)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder / "model", rank_settings.output_path)
    ]
    for prompt, sides in words.items():
        num = len(tokenizer(prompt).input_ids)
        before, after = (
            [plain_logprob(model, [*tokenizer(prompt + side).input_ids, 1], num) for side in sides] for model in models
        )
        assert after[0] - after[1] > before[0] - before[1] + 1


def test_long_pairs_are_refused_or_cut_and_counted(folder: Path, tmp_path: Path) -> None:
    rank_settings = settings(folder, "dpo", tmp_path)
    with pytest.raises(InputError, match=r"dpo\.max_tokens is 30"):
        make_rank(replace(rank_settings, stage=rank_settings.stage.model_copy(update={"max_tokens": 30})))
    cut = rank_settings.stage.model_copy(update={"max_tokens": 30, "long_examples": "cut"})
    counts = make_rank(replace(rank_settings, stage=cut)).counts()
    assert counts["num_cut"] > 0
    assert counts["num_examples"] + counts["num_dropped"] == NUM_ROWS


def test_counts_have_the_steps_and_the_mismatched_responses_that_were_cut(folder: Path, tmp_path: Path) -> None:
    assert make_rank(settings(folder, "dpo", tmp_path)).counts()["num_steps"] == 9
    rows = [{"prompt": f"the {'x' * (60 * i)}", "completion": "y" * (80 - 60 * i), "label": bool(i)} for i in (0, 1)]
    data = written(tmp_path / "rows.jsonl", *rows)
    stage = DpoConfig(loss="kto", held_out_share=0.0)
    counts = make_rank(replace(settings(folder, "kto", tmp_path), stage=stage, sources=(Source(data),))).counts()
    assert (counts["num_steps"], counts["num_mismatched_cut"]) == (1, 1)


def test_rows_of_metrics_are_json(folder: Path, tmp_path: Path) -> None:
    for stage in ("dpo", "kto"):
        json.dumps(all_rows(settings(folder, stage, tmp_path / stage)), allow_nan=False)
