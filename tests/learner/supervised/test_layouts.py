"""Supervised stages give the same weights packed or padded, in micro-batches, on ranks or sharded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from learner.distributed.ranks import Ranks
from learner.model.reward_net import RewardNet
from learner.supervised.examples import Pair
from learner.supervised.loop import Row
from learner.supervised.preferences import CENTERING, PreferenceLoss, pair_rewards, preference_nll
from learner.supervised.rank import SupervisedRank, load_net
from tests.learner.conftest import run_two_ranks
from tests.learner.ppo.test_rllib import largest_difference
from tests.support.supervised_ranks import CPU, LAYOUTS, STAGES, settings, steps, stream, untimed, write_inputs

pytestmark = [pytest.mark.process, pytest.mark.slow]

PIECES: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "packed pieces": {"micro_batch_tokens": 80},
    "padded pieces": {"packing": False, "micro_batch_tokens": 80},
    "one row at a time": {"micro_batch_tokens": 1},
    "chunks of the vocabulary's distributions": {"logprob_chunk_tokens": 5},
    "activations computed again": {"activation_checkpointing": True},
}
ONE = Ranks(CPU, distributed=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def descended(folder: Path, stage: str, dtype: str, **changes: Any) -> tuple[dict[str, Tensor], list[Row]]:
    """Return the last step's gradient, the weights after it and all rows, with plain gradient descent."""
    rank_settings = settings(folder, stage, folder, dtype=dtype, **changes)
    rank_settings = replace(rank_settings, checkpoints_path=None, reference_path=None)
    net = load_net(rank_settings)
    rank = SupervisedRank(rank_settings, net, torch.optim.SGD(net.parameters()), ONE, CPU)
    rows = untimed(list(islice(steps(rank), 3)))
    weights = {name: weights.detach() for name, weights in net.named_parameters()}
    return {f"{name}.grad": w.grad for name, w in net.named_parameters() if w.grad is not None} | weights, rows


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("stage", STAGES)
def test_the_layout_changes_only_rounding(folder: Path, stage: str, dtype: str, limit: float) -> None:
    plain, rows = descended(folder, stage, dtype)
    for layout, changes in PIECES.items():
        other, other_rows = descended(folder, stage, dtype, **changes)
        assert other.keys() == plain.keys()
        assert largest_difference(plain, other) < limit, layout
        for row, again in zip(rows, other_rows, strict=True):
            if stage in ("dpo", "kto") and row["step"] == 1:
                row, again = ({**each, "accuracy": 0.5} for each in (row, again))  # the sign of rounding errors
            assert again == pytest.approx(row, rel=10 * limit, abs=10 * limit), layout
    start = load_net(settings(folder, stage, folder, dtype=dtype)).state_dict()
    assert largest_difference({name: weights for name, weights in plain.items() if name in start}, start) > 1e-4


def test_half_precision_computes_in_bfloat16_and_trains_in_float32(folder: Path) -> None:
    for stage in STAGES:
        exact, half = descended(folder, stage, "float32")[0], descended(folder, stage, "bfloat16")[0]
        assert {tensor.dtype for tensor in half.values()} == {torch.float32}
        assert 0 < largest_difference(exact, half) < 0.2


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("pad_token_id", [0, 1])
def test_rewards_match_the_plain_model_on_each_sequence(folder: Path, packing: bool, pad_token_id: int) -> None:
    net = RewardNet(folder / "model", "float32", packing=packing, activation_checkpointing=False, seed=0)
    net.model.config.pad_token_id = pad_token_id
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1).eval()
    plain.config.pad_token_id = pad_token_id
    sequences = [[2, 9, 8, 1], [2, 30], [2, *range(7, 40), 1, 1], [2, 5, 1]]
    with torch.no_grad():
        alone = [plain(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in sequences]
        assert net(sequences).tolist() == pytest.approx(alone, abs=1e-6)
    assert len(set(alone)) == 4


def test_the_reward_offset_is_that_of_the_batch_for_any_micro_batch(folder: Path) -> None:
    net = RewardNet(folder / "model", "float64", packing=True, activation_checkpointing=False, seed=0)
    pairs = [Pair([2, 9 + i, 8, 1], [2, 30 - i, 1], 1, i / 4) for i in range(5)]
    chosen, rejected = pair_rewards(net, pairs)
    loss = preference_nll(chosen, rejected, pairs).mean() + CENTERING * (chosen + rejected).mean().square()
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for pieces in ([pairs], [pairs[:2], pairs[2:]], [pairs[:1], [], pairs[1:]]):
        net.zero_grad()
        row = PreferenceLoss(net, ONE, CPU).accumulate(pieces, pairs)
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-12)
        for weights, gradient in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(weights.grad, gradient, atol=1e-12, rtol=1e-9)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two ranks for every stage and layout, with ddp and fsdp2.

    The processes themselves compare resumed with uninterrupted training.
    """
    folder = write_inputs(tmp_path_factory.mktemp("ranks"))
    run_two_ranks("tests.support.supervised_ranks", folder)
    return folder


LAST_BITS = 3e-5
"""Tolerance for float32 sums in another order, amplified by Adam; the order depends on the processor."""
CASES = [(stage, layout, data_parallel) for stage in STAGES for layout in LAYOUTS for data_parallel in ("ddp", "fsdp2")]


@pytest.mark.parametrize(("stage", "layout", "data_parallel"), CASES)
def test_two_ranks_match_one_up_to_rounding(
    two_ranks: Path, tmp_path: Path, stage: str, layout: str, data_parallel: str
) -> None:
    one = settings(two_ranks, stage, tmp_path, **LAYOUTS[layout])
    list(stream(one))
    place = two_ranks / f"{stage} {layout} {data_parallel}"
    both = load_file(place / "whole" / "out" / "model.safetensors")
    alone = load_file(tmp_path / "out" / "model.safetensors")
    assert both.keys() == alone.keys()
    assert largest_difference(alone, both) < (1e-6 if "float64" in layout else LAST_BITS)
    assert sorted(path.name for path in one.output_path.iterdir()) == sorted(
        path.name for path in (place / "whole" / "out").iterdir()
    )


@pytest.mark.parametrize(("stage", "layout", "data_parallel"), CASES)
def test_two_ranks_resume_bit_for_bit(two_ranks: Path, stage: str, layout: str, data_parallel: str) -> None:
    place = two_ranks / f"{stage} {layout} {data_parallel}"
    whole, resumed = (place / name / "out" / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_resumes_from_the_shards_of_two(two_ranks: Path, tmp_path: Path, stage: str) -> None:
    place = two_ranks / f"{stage} packed fsdp2"
    (kept,) = (place / "kept").iterdir()
    assert {file.suffix for file in kept.iterdir()} == {".safetensors", ".json"}
    shutil.copytree(place / "kept", tmp_path / "checkpoints")
    rank_settings = settings(two_ranks, stage, tmp_path)
    _, first, *_ = stream(rank_settings)
    assert first["step"] == 1, "the rows before the checkpoint are repeated"
    shutil.copytree(place / "kept", tmp_path / "checkpoints", dirs_exist_ok=True)
    list(stream(rank_settings))
    expected = load_file(place / "whole" / "out" / "model.safetensors")
    assert largest_difference(expected, load_file(tmp_path / "out" / "model.safetensors")) < 1e-5
