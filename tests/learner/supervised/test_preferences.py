"""Reward models rank responses as the preferences do; transformers loads their folder."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cluster.data.datasets import Reading, Source
from cluster.errors import InputError
from examples.reviews.grammar import all_prompts, sample_review, topic_of
from examples.reviews.model import build_model
from examples.reviews.oracle import praise
from learner.config import LearnerConfig, RewardModelConfig
from learner.place import Place
from learner.supervised.batches import split, split_by_draw
from learner.supervised.calibration import measures
from learner.supervised.examples import Pair, draw_of
from learner.supervised.loop import Row
from learner.supervised.preferences import agreement, preference_nll
from learner.supervised.rank import SupervisedSettings
from tests.support.supervised_ranks import make_rank, stream

CONFIG = RewardModelConfig(num_epochs=2, batch_size=32, learning_rate=5e-3)


def train_reward_model(
    model: Path, data: Path, output: Path, config: RewardModelConfig, *, seed: int, fresh: Path | None = None
) -> Iterator[Row]:
    place = Place(model, seed=seed)
    return stream(SupervisedSettings(LearnerConfig(), config, place, (Source(data),), output, fresh_path=fresh))


def write_pairs(path: Path, num: int, seed: int) -> Path:
    """Write pairs without noise: the chosen response is the one with more praise."""
    choice = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < num:
        prompt = choice.choice(all_prompts())
        pair = sorted((sample_review(str(topic_of(prompt)), choice) for _ in range(2)), key=praise)
        if praise(pair[0]) < praise(pair[1]):
            rows.append({"prompt": prompt, "chosen": pair[1], "rejected": pair[0]})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    path = tmp_path_factory.mktemp("reward_model")
    build_model(path / "model", seed=0)
    preferences = write_pairs(path / "preferences.parquet", 800, seed=0)
    return path, list(train_reward_model(path / "model", preferences, path / "trained", CONFIG, seed=0))


def test_the_last_metrics_are_the_accuracy_on_held_out_pairs(trained: tuple[Path, list[dict[str, float]]]) -> None:
    counts, *steps, last = trained[1]
    expected = {"num_examples": 800, "num_cut": 0, "num_dropped": 0, "num_held_out": 80}
    assert counts == expected | {"num_steps": 46, "learning_rate": 5e-3}
    assert [m["step"] for m in steps] == list(range(1, 2 * 23 + 1))
    assert steps[0]["loss"] > 0.6 > 0.3 > steps[-1]["loss"]
    assert last["accuracy"] == steps[-1]["held_out_accuracy"] >= 0.9
    assert (last["best_step"], last["held_out_loss"]) == (46, steps[-1]["held_out_loss"])


def test_the_written_model_is_measured_on_fresh_pairs_if_any(
    trained: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    source = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(trained[0] / "model", dtype=torch.bfloat16).save_pretrained(source)
    AutoTokenizer.from_pretrained(trained[0] / "model").save_pretrained(source)
    fresh, preferences = write_pairs(tmp_path / "fresh.parquet", 300, seed=1), trained[0] / "preferences.parquet"
    *_, last = train_reward_model(source, preferences, tmp_path / "out", CONFIG, seed=0, fresh=fresh)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    tokenizer, rewards = AutoTokenizer.from_pretrained(tmp_path / "out"), []
    for column in ("chosen", "rejected"):
        rows = pq.read_table(fresh).to_pylist()
        texts = [row["prompt"] + row[column] + tokenizer.eos_token for row in rows]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            rewards.append(model.float()(**batch).logits[:, 0])
    assert last["accuracy"] == agreement(*rewards).mean().item() >= 0.9


def test_transformers_reads_the_same_rewards_from_the_folder(
    trained: tuple[Path, list[dict[str, float]]],
) -> None:
    folder = trained[0] / "trained"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "we tried the new film on friday night:"
    texts = [
        prompt + response + tokenizer.eos_token
        for response in (
            "the film was great and superb.",
            "the film was new.",
            "the film was bad, the acting was dull.",
        )
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        together = model(**batch).logits[:, 0]
        alone = [model(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0, 0].item() for text in texts]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert alone == sorted(alone, reverse=True)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.num_labels == 1


def test_the_same_seed_gives_the_same_weights(trained: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    preferences = write_pairs(tmp_path / "preferences.parquet", 40, seed=0)
    config = RewardModelConfig(num_epochs=1, batch_size=16)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        list(train_reward_model(trained[0] / "model", preferences, tmp_path / name, config, seed=seed))
    first, second, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second != other


def test_a_margin_widens_the_distance_that_the_loss_asks_for() -> None:
    chosen, rejected = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, -1.0, -1.0])
    pairs = [Pair([1], [2]), Pair([1], [2]), Pair([1], [2], margin=3.0)]
    wanted = [-math.log(1 / (1 + math.exp(-distance))) for distance in (0.0, 2.0, -1.0)]
    assert preference_nll(chosen, rejected, pairs).tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_smoothed_label_is_partly_the_opposite_one() -> None:
    chosen, rejected, pairs = torch.tensor([2.0, 0.5]), torch.tensor([0.0, 0.0]), [Pair([1], [2], margin=0.5)] * 2
    smooth = preference_nll(chosen, rejected, pairs, 0.2)
    forth, back = (-math.log(1 / (1 + math.exp(-distance))) for distance in (1.5, -1.5))
    assert smooth.tolist() == pytest.approx([0.8 * forth + 0.2 * back, math.log(2)], abs=1e-6)
    assert preference_nll(chosen, rejected, pairs, 0.0).tolist() == preference_nll(chosen, rejected, pairs).tolist()


def test_the_smoothed_loss_is_lowest_at_the_odds_of_a_right_label() -> None:
    distances = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    nll = preference_nll(distances, torch.zeros_like(distances), [Pair([1], [2])] * 2001, 0.1)
    assert distances[nll.argmin()].item() == pytest.approx(math.log(0.9 / 0.1), abs=0.005)


def test_labels_are_smoothed_in_training_but_not_in_measurements(
    trained: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    preferences = write_pairs(tmp_path / "preferences.parquet", 40, seed=0)
    margins = {}
    for smoothing in (0.0, 0.4):
        config = RewardModelConfig(num_epochs=4, batch_size=16, learning_rate=5e-3, label_smoothing=smoothing)
        *_, last = train_reward_model(trained[0] / "model", preferences, tmp_path / "out", config, seed=0)
        margins[smoothing] = last["margin_mean"]
    assert abs(margins[0.4]) < margins[0.0] / 2


def test_the_folder_has_the_measurements_and_reward_statistics(
    trained: tuple[Path, list[dict[str, float]]],
) -> None:
    folder, last = trained[0] / "trained", trained[1][-1]
    rewards = pq.read_table(folder / "held_out_rewards.parquet").to_pydict()
    assert len(rewards["chosen"]) == 80
    measured = {name: last[name] for name in ("accuracy", "ece", "nll", "margin_mean")}
    assert measures(rewards["chosen"], rewards["rejected"]) == pytest.approx(measured)
    every = torch.tensor(rewards["chosen"] + rewards["rejected"], dtype=torch.float64)
    statistics = json.loads((folder / "reward_statistics.json").read_text())
    assert statistics == pytest.approx({"mean": every.mean().item(), "std": every.std(correction=0).item(), "num": 160})
    record = json.loads((folder / "training.json").read_text())
    assert (record["member"], record["seed"], record["num_examples"], record["ece"]) == (0, 0, 800, last["ece"])
    assert record["settings"] == CONFIG.model_dump()


def test_members_share_held_out_pairs_but_not_head_and_order(
    trained: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    preferences = write_pairs(tmp_path / "preferences.parquet", 40, seed=0)
    config, place = RewardModelConfig(num_epochs=1, batch_size=8), Place(trained[0] / "model", seed=7)
    sources = (Source(preferences),)
    ranks = [
        make_rank(SupervisedSettings(LearnerConfig(), config, place, sources, tmp_path / "out", member=member))
        for member in (0, 1, 2, 1)
    ]
    held_out, training = ([getattr(rank, name) for rank in ranks] for name in ("_held_out", "_training"))
    assert held_out[0] == held_out[1] == held_out[2]
    assert training[0] == training[1]
    heads = [rank._model.score.weight.tolist() for rank in ranks]
    assert heads[0] != heads[1] != heads[2] != heads[0]
    assert heads[1] == heads[3]
    losses = [[row["loss"] for row in rank.advance(9)] for rank in ranks]
    assert losses[1] == losses[3]
    orders = [rank._generator.get_state().tolist() for rank in ranks]
    assert orders[0] != orders[1] != orders[2]


def test_pairs_held_out_by_prompt_stay_held_out_when_pairs_are_added(
    trained: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    few, more = (write_pairs(tmp_path / f"{num}.parquet", num, seed=num) for num in (60, 50))
    config = RewardModelConfig(num_epochs=1, batch_size=8, held_out_share=0.3)
    rank_settings = SupervisedSettings(
        LearnerConfig(), config, Place(trained[0] / "model"), (Source(few),), tmp_path / "out", by_prompt=True
    )
    before, after = make_rank(rank_settings), make_rank(replace(rank_settings, more_path=more))
    assert after.counts()["num_more"] == 50
    assert after.counts()["num_examples"] == 110
    assert [pair for pair in after._held_out if pair in before._held_out] == before._held_out
    assert [pair for pair in after._training if pair in before._training] == before._training
    assert all(pair.draw < 0.3 for pair in after._held_out)
    assert after._held_out


def test_broken_pairs_are_skipped_counted_and_logged_if_asked(
    trained: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    preferences = write_pairs(tmp_path / "preferences.parquet", 20, seed=0)
    rows = pq.read_table(preferences).to_pylist()
    rows[3]["chosen"], rows[5]["rejected"] = None, None
    pq.write_table(pa.Table.from_pylist(rows), preferences)
    settings = SupervisedSettings(
        LearnerConfig(), CONFIG, Place(trained[0] / "model"), (Source(preferences),), tmp_path / "out"
    )
    with pytest.raises(InputError, match=r"preferences\.parquet, row 3: column 'chosen': expected text, got None"):
        make_rank(settings)
    place = replace(settings.place, log_dir=tmp_path / "logs")
    rank = make_rank(replace(settings, reading=Reading(broken_rows="skip"), place=place))
    assert (rank.counts()["num_examples"], rank.counts()["num_broken"]) == (18, 2)
    lines = (tmp_path / "logs" / "broken_rows_reward_model.txt").read_text().splitlines()
    assert lines == [
        f"{preferences}, row {n}: column {c!r}: expected text, got None" for n, c in ((3, "chosen"), (5, "rejected"))
    ]


def test_neither_side_is_empty_with_few_prompts_and_one_is_refused() -> None:
    rows = ["a", "b", "a"]
    assert split_by_draw(rows, [0.8, 0.9, 0.8], 0.1, Path("pairs")) == (["b"], ["a", "a"])
    assert split_by_draw(rows, [0.01, 0.02, 0.01], 0.1, Path("pairs")) == (["b"], ["a", "a"])
    assert draw_of("a") == draw_of("a") != draw_of("b")
    with pytest.raises(InputError, match="pairs: all pairs have one prompt"):
        split_by_draw(rows, [0.5] * 3, 0.1, Path("pairs"))


def test_a_tie_counts_half() -> None:
    assert agreement(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [1, 0, 0.5]


def test_margins_in_the_data_are_used_in_training(trained: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    preferences = write_pairs(tmp_path / "plain.parquet", 40, seed=0)
    table = pq.read_table(preferences)
    losses = {}
    for name, margin in (("plain", None), ("zero", 0.0), ("wide", 5.0)):
        data = table if margin is None else table.append_column("margin", pa.array([margin] * len(table)))
        pq.write_table(data, tmp_path / f"{name}.parquet")
        config = RewardModelConfig(num_epochs=1, batch_size=16)
        *_, last = train_reward_model(
            trained[0] / "model", tmp_path / f"{name}.parquet", tmp_path / name, config, seed=0
        )
        losses[name] = last["held_out_loss"]
    plain, zero, wide = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "zero", "wide"))
    assert plain == zero != wide
    assert losses["plain"] == losses["zero"] < 1 < 4 < losses["wide"]


def test_long_pairs_are_cut_or_dropped_in_training_and_measuring(
    trained: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    preferences = write_pairs(tmp_path / "preferences.parquet", 40, seed=0)
    rows = pq.read_table(preferences).to_pylist()
    rows[3] |= {"chosen": "good " * 200, "rejected": "bad " * 200}
    pq.write_table(pa.Table.from_pylist(rows), preferences)
    rules: tuple[tuple[Literal["cut", "drop"], int, int], ...] = (("cut", 1, 0), ("drop", 0, 1))
    for rule, cut, dropped in rules:
        config = RewardModelConfig(num_epochs=1, batch_size=16, long_examples=rule)
        arguments = (trained[0] / "model", preferences, tmp_path / rule, config)
        counts, *_, last = train_reward_model(*arguments, seed=0, fresh=preferences)
        assert [counts[f"num_{name}"] for name in ("examples", "cut", "dropped")] == [40 - dropped, cut, dropped]
        assert 0 <= last["accuracy"] <= 1
    with pytest.raises(InputError, match=r"row 3: .* tokens, but the model's context is 128"):
        list(train_reward_model(trained[0] / "model", preferences, tmp_path / "error", CONFIG, seed=0))


def test_few_pairs_leave_at_least_one_to_train_on_and_one_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [([i], [i]) for i in range(3)]
    for share in (0.01, 0.99):
        training, held_out = split(pairs, share, generator, Path("pairs"))
        assert sorted([*training, *held_out]) == pairs
        assert training
        assert held_out
    with pytest.raises(InputError, match="pairs: a single row"):
        split(pairs[:1], 0.5, generator, Path("pairs"))


def test_missing_columns_and_missing_folders_are_input_errors(
    trained: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    preferences = tmp_path / "preferences.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), preferences)
    with pytest.raises(InputError, match=r"preferences\.parquet: no column 'rejected'"):
        list(train_reward_model(trained[0] / "model", preferences, tmp_path / "out", CONFIG, seed=0))
    with pytest.raises(InputError, match="nowhere: no model folder"):
        list(train_reward_model(tmp_path / "nowhere", preferences, tmp_path / "out", CONFIG, seed=0))
    assert not (tmp_path / "out").exists()
