"""The engine on a GPU: sampled tokens/s, seeded sampling again, swaps and their proofs, log-probabilities.

A Qwen-shaped random model of 0.5 B parameters, the engine alone: no Ray, no rewards. With the engine core in this
process, without CUDA graphs (`eager`), and by vLLM's defaults in a separate process. Without a GPU there is nothing
to measure, which it says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.learner import SHAPES, make_model
from benchmarks.results import Row
from cluster.errors import EngineError
from cluster.weights.manifest import Manifest, Probe
from learner.model.actor_critic import ActorCritic, ModelSettings
from learner.ppo.weights import default_probe, probe_logprobs, published_tensors
from rollout_actors.engine.protocol import SamplingRequest
from rollout_actors.engine.swap_check import SwapProof, Verdict, distance
from rollout_actors.engine.vllm_engine import VllmEngine

SHAPE = "0.5 B"
NUM_REQUESTS, PROMPT_TOKENS, RESPONSE_TOKENS, NUM_AGAIN = 128, 64, 256, 16
NUM_SWAPS, REPEATS = 6, 3
NOISE = 0.5
"""What a version differs from the one before by, relative to each tensor's deviation."""
DEVICE = torch.device("cuda")
MODES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("float32, one process, eager", "float32", "0", {"enforce_eager": True}),
    ("bfloat16, one process, eager", "bfloat16", "0", {"enforce_eager": True}),
    ("bfloat16, core in its own process", "bfloat16", "1", {}),
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What all requests came to."""

    tokens: dict[str, list[int]]
    logprobs: dict[str, list[float]]
    seconds: float

    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens.values())) / self.seconds


def measure(folder: Path) -> list[Row]:
    """Nothing where there is no GPU."""
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return []
    make_model(folder / "model", SHAPES[SHAPE])
    return [row for mode in MODES for row in _in_a_new_process(folder / "model", *mode)]


def _in_a_new_process(*args: Any) -> list[Row]:
    """vLLM reads its environment once a process, and one that ends gives back all of the GPU's memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, *args).result()


def _measure(path: Path, name: str, dtype: str, multiprocessing: str, engine_args: Mapping[str, Any]) -> list[Row]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = multiprocessing
    started = time.perf_counter()
    engine = VllmEngine(
        str(path),
        engine_args={"max_num_seqs": NUM_REQUESTS, "gpu_memory_utilization": 0.3, **engine_args},
        max_model_len=1024,
        seed=0,
        dtype=dtype,
    )
    rows = [Row(f"{name}: engine up", (time.perf_counter() - started,), "s")]
    try:
        trainer = ActorCritic(ModelSettings(path, dtype, "none", 1.0)).to(DEVICE).requires_grad_(False)
        return rows + _sampled(engine, trainer, name) + _swapped(engine, trainer, dtype, name)
    finally:
        engine.close()


def _sampled(engine: VllmEngine, trainer: ActorCritic, name: str) -> list[Row]:
    """Tokens/s, how many responses a seed gives again, and how far the trainer's log-probabilities are."""
    requests = _requests()
    first, *others = [sample(engine, requests) for _ in range(REPEATS + 1)]
    again = [first.tokens == other.tokens for other in others]
    alone = [sample(engine, [request]) for request in requests[:NUM_AGAIN]]
    same = [one.tokens[request.id] == first.tokens[request.id] for one, request in zip(alone, requests, strict=False)]
    gaps = [gap for request in requests[:NUM_AGAIN] for gap in _gaps(trainer, request, first)]
    return [
        Row(f"{name}: sampled tokens/s, {NUM_REQUESTS} at once", tuple(o.tokens_per_s() for o in others), "tokens/s"),
        Row(f"{name}: the same batch again gives the same tokens", (sum(again) / len(again),)),
        Row(f"{name}: one by one, responses with the batch's tokens", (sum(same) / len(same),)),
        Row(f"{name}: log-probabilities, engine's from the trainer's, median", (median(gaps),), "nats"),
        Row(f"{name}: log-probabilities, engine's from the trainer's, largest", (max(gaps),), "nats"),
    ]


def _requests() -> list[SamplingRequest]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, (NUM_REQUESTS, PROMPT_TOKENS), generator=generator).tolist()
    return [SamplingRequest(str(i), prompt, RESPONSE_TOKENS, 2**40 + i, 1.0) for i, prompt in enumerate(prompts)]


def sample(engine: VllmEngine, requests: Sequence[SamplingRequest]) -> Sampling:
    """All requests from their first token to their last."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    logprobs: dict[str, list[float]] = {request.id: [] for request in requests}
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for new in engine.step():
            tokens[new.id] += new.token_ids
            logprobs[new.id] += new.logprobs
    return Sampling(tokens, logprobs, time.perf_counter() - started)


def _gaps(trainer: ActorCritic, request: SamplingRequest, sampling: Sampling) -> list[float]:
    """|engine's - trainer's| for each token of a response."""
    whole = [*request.token_ids, *sampling.tokens[request.id]]
    expected = probe_logprobs(trainer, [tuple(whole)], DEVICE)[0][len(request.token_ids) - 1 :]
    return [abs(a - b) for a, b in zip(sampling.logprobs[request.id], expected, strict=True)]


def _swapped(engine: VllmEngine, trainer: ActorCritic, dtype: str, name: str) -> list[Row]:
    """Versions loaded one after the other, each judged as a rollout actor judges it; the last is loaded in vain."""
    probe_ids = default_probe(trainer.policy.config, 0)
    proof, seconds, verdicts, previous = SwapProof("benchmark", dtype), list[float](), list[Verdict](), None
    away = list[float]()
    for version in range(NUM_SWAPS):
        if version:
            _move(trainer, version)
        probe = probe_logprobs(trainer, probe_ids, DEVICE)
        tensors = {key: tensor.cpu() for key, tensor in published_tensors(trainer.policy, getattr(torch, dtype))}
        started = time.perf_counter()
        engine.load(tensors, version=version)
        seconds.append(time.perf_counter() - started)
        computed = engine.logprobs(probe_ids)
        away.append(distance(computed, probe))
        verdicts.append(proof.check(Manifest(version, "benchmark", (), probe_ids, probe, previous), computed))
        previous = probe
    proved = sum(verdict is Verdict.PROVED for verdict in verdicts[1:]) / (NUM_SWAPS - 1)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e9
    refused = _refuses_a_stale_engine(engine, trainer, proof, probe_ids, previous or [])
    return [
        Row(f"{name}: loading a version of {size:.2g} GB", tuple(seconds), "s"),
        Row(f"{name}: probe's distance from the trainer's", tuple(away), "nats"),
        Row(f"{name}: swaps proved", (proved,), "", ">= 1"),
        Row(f"{name}: swaps that were not made, refused", (float(refused),), "", ">= 1"),
    ]


def _refuses_a_stale_engine(
    engine: VllmEngine, trainer: ActorCritic, proof: SwapProof, probe_ids: Any, previous: Probe
) -> bool:
    """Whether an engine that kept its weights is found out."""
    _move(trainer, NUM_SWAPS)
    probe = probe_logprobs(trainer, probe_ids, DEVICE)
    manifest = Manifest(NUM_SWAPS, "benchmark", (), probe_ids, probe, previous)
    try:
        proof.check(manifest, engine.logprobs(probe_ids))
    except EngineError:
        return True
    return False


def _move(trainer: ActorCritic, seed: int) -> None:
    """Another version: every matrix a little changed."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator, device=DEVICE, dtype=parameter.dtype)
                parameter.add_(noise, alpha=NOISE * float(parameter.std()))
