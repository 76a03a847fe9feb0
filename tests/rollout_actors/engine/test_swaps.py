"""Tests of swaps of a real engine: segments, log-probabilities, proofs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import EngineError, WeightsRefused
from cluster.trajectory import Segment, segment_seed
from cluster.weights.manifest import Manifest
from cluster.weights.object_store import Slice, fetch_tensors, put_tensors
from rollout_actors.engine.protocol import SamplingRequest
from rollout_actors.engine.response import ResponseRequest, SampledResponse
from rollout_actors.engine.thread import EngineThread
from rollout_actors.engine.vllm_engine import VllmEngine
from tests.support import tiny

pytestmark = pytest.mark.process

NUM_RESPONSES = 6
PROMPTS = [[5, 6, 7, 8 + i] for i in range(NUM_RESPONSES)]


class ForgetfulEngine(VllmEngine):
    """Loads only the first version."""

    num_loads = 0

    def load(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        self.num_loads += 1
        if self.num_loads == 1:
            super().load(tensors, version=version)


class PublishAfter:
    """Offers a version in the engine thread, before step `num_steps`."""

    def __init__(self, num_steps: int) -> None:
        self.remaining = num_steps
        self.offer: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            self.offer()


def thread_of(folder: Path, engine: type[VllmEngine] = VllmEngine, **kwargs: Any) -> EngineThread:
    build = partial(engine, str(folder), engine_args={}, max_model_len=64, seed=0, dtype="float32")
    return EngineThread(build, name="rollout-0", dtype="float32", **kwargs)


async def sample_across_a_swap(folder: Path, old: Any, new: Any) -> tuple[list[SampledResponse], dict[str, Any]]:
    """Sample responses that start with version 0 and continue with version 1 after 3 tokens."""
    publish = PublishAfter(3)
    engine = thread_of(folder, before_step=publish)
    publish.offer = lambda: engine.offer_weights(tiny.manifest(1, new, old), tiny.checkpoint(new))
    await engine.start()
    sampling = [
        asyncio.ensure_future(engine.sample(ResponseRequest(f"0-{i}-0", prompt, 16, 1.0, 0)))
        for i, prompt in enumerate(PROMPTS)
    ]
    await asyncio.sleep(0)
    engine.offer_weights(tiny.manifest(0, old, None), tiny.checkpoint(old))
    responses = await asyncio.gather(*sampling)
    metrics = engine.metrics()
    await engine.close()
    return responses, metrics


async def test_a_swap_gives_two_segments_with_exact_logprobs(folder: Path) -> None:
    old = tiny.load_model(folder)
    new = tiny.after_one_step(old, 5e-3)
    responses, metrics = await sample_across_a_swap(folder, old, new)

    interrupted = [response for response in responses if len(response.token_ids) > 3]
    assert len(interrupted) >= NUM_RESPONSES - 1
    for response in interrupted:
        assert [(s.policy_version, s.start) for s in response.segments] == [(0, 0), (1, 3)]
        assert [s.seed for s in response.segments] == [segment_seed(response.uid, k) for k in (0, 1)]
    for prompt, response in zip(PROMPTS, responses, strict=True):
        with_old, with_new = (tiny.logprobs(model, prompt + response.token_ids)[3:] for model in (old, new))
        assert np.allclose(response.logprobs[:3], with_old[:3], rtol=0, atol=1e-5)
        assert np.allclose(response.logprobs[3:], with_new[3:], rtol=0, atol=1e-5)
    assert metrics["num_swaps_proved"] == 2
    assert metrics["num_prefilled_again_tokens"] == len(interrupted) * (4 + 3)


async def test_resampling_a_segment_with_its_seed_gives_the_same_tokens(tied_folder: Path) -> None:
    models = [tiny.load_model(tied_folder)]
    models.append(tiny.after_one_step(models[0], 5e-3))
    responses, _ = await sample_across_a_swap(tied_folder, *models)
    engine = VllmEngine(str(tied_folder), engine_args={}, max_model_len=64, seed=0, dtype="float32")
    for version in (1, 0):
        engine.load(tiny.checkpoint(models[version]), version=version)
        for prompt, response in zip(PROMPTS, responses, strict=True):
            for segment in response.segments:
                if segment.policy_version == version:
                    assert resampled(engine, prompt, response, segment) == segment_tokens(response, segment)
    engine.close()


def segment_tokens(response: SampledResponse, segment: Segment) -> list[int]:
    return response.token_ids[segment.start : segment.start + segment.length]


def resampled(engine: VllmEngine, prompt: list[int], response: SampledResponse, segment: Segment) -> list[int]:
    prefix = prompt + response.token_ids[: segment.start]
    engine.add(SamplingRequest("again", prefix, segment.length, segment.seed, 1.0))
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token for new in engine.step() for token in new.token_ids]
    return tokens


@pytest.mark.parametrize("learning_rate", [5e-7, 5e-4])
async def test_a_skipped_swap_is_refused(folder: Path, learning_rate: float) -> None:
    old = tiny.load_model(folder)
    new = tiny.after_one_step(old, learning_rate)
    engine = thread_of(folder, ForgetfulEngine)
    await engine.start()
    engine.offer_weights(tiny.manifest(0, old, None), tiny.checkpoint(old))
    await engine.loaded(0)
    engine.offer_weights(tiny.manifest(1, new, old), tiny.checkpoint(new))
    with pytest.raises(EngineError, match=r"rollout-0: does not hold version 1: its probe is .* from version 0"):
        await engine.loaded(1)
    with pytest.raises(EngineError):
        await engine.ended()


@pytest.mark.parametrize("learning_rate", [5e-7, 5e-4])
async def test_swaps_of_large_and_small_steps_are_proved(folder: Path, learning_rate: float) -> None:
    models = [tiny.load_model(folder)]
    for _ in range(3):
        models.append(tiny.after_one_step(models[-1], learning_rate))
    engine = thread_of(folder)
    await engine.start()
    for version, model in enumerate(models):
        previous = models[version - 1] if version else None
        engine.offer_weights(tiny.manifest(version, model, previous), tiny.checkpoint(model))
        await engine.loaded(version)
    metrics = engine.metrics()
    await engine.close()
    assert (metrics["num_swaps_proved"], metrics["num_swaps_checksum_only"]) == (4, 0)


async def test_a_step_below_the_noise_is_counted_as_checksum_only(tied_folder: Path) -> None:
    old = tiny.load_model(tied_folder)
    new = tiny.after_one_step(old, 1e-10)
    engine = thread_of(tied_folder)
    await engine.start()
    engine.offer_weights(tiny.manifest(0, old, None), tiny.checkpoint(old))
    await engine.loaded(0)
    engine.offer_weights(tiny.manifest(1, new, old), tiny.checkpoint(new))
    await engine.loaded(1)
    metrics = engine.metrics()
    await engine.close()
    assert (metrics["num_swaps_proved"], metrics["num_swaps_checksum_only"]) == (1, 1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_tensor_altered_in_the_object_store_is_refused(tied_folder: Path) -> None:
    import ray

    model = tiny.load_model(tied_folder)
    entries = list(put_tensors(tiny.checkpoint(model).items()))
    slice_ = entries[3].reference
    altered = np.array(ray.get(slice_.bucket)[slice_.start : slice_.stop])
    altered[5] ^= 1
    entries[3] = replace(entries[3], reference=Slice(ray.put(altered), 0, altered.size))
    with pytest.raises(WeightsRefused, match=entries[3].name):
        fetch_tensors(Manifest(1, "first", tuple(entries), (), [], None), timeout_s=10)
