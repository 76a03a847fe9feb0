"""Tests of the real engine against transformers: sampling, log-probabilities, loading, settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import EngineError, InputError
from rollout_actors.config import RolloutActorsConfig
from rollout_actors.engine.arguments import known_arguments
from rollout_actors.engine.loading import build_vllm
from rollout_actors.engine.protocol import Sampled, SamplingRequest, Truncation
from rollout_actors.engine.vllm_engine import VllmEngine, engine_settings
from tests.support import tiny

pytestmark = pytest.mark.process

PROMPT = [5, 6, 7]
EXACT = 1e-5


@pytest.fixture
def engine(folder: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(str(folder), engine_args={}, max_model_len=64, seed=0, dtype="float32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tied_engine(tied_folder: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(str(tied_folder), engine_args={}, max_model_len=64, seed=0, dtype="float32")
    yield engine
    engine.close()


def run(engine: VllmEngine, requests: Sequence[SamplingRequest]) -> dict[str, Sampled]:
    """Run the requests to their end and join the tokens of each."""
    for request in requests:
        engine.add(request)
    joined: dict[str, Sampled] = {}
    while engine.has_work():
        for new in engine.step():
            old = joined.get(new.id, Sampled(new.id, [], [], None))
            joined[new.id] = Sampled(
                new.id, old.token_ids + new.token_ids, old.logprobs + new.logprobs, new.finish_reason
            )
    return joined


def request(seed: int, *, temperature: float = 1.0, max_tokens: int = 16) -> SamplingRequest:
    return SamplingRequest(str(seed), [*PROMPT, 8 + seed % 32], max_tokens, 2**62 + seed, temperature)


def worst(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_sampled_tokens_match_transformers(
    tied_engine: VllmEngine, tied_folder: Path, temperature: float
) -> None:
    requests = [request(seed, temperature=temperature) for seed in range(8)]
    sampled = run(tied_engine, requests)
    model = tiny.load_model(tied_folder)
    for each in requests:
        found = sampled[each.id]
        expected = tiny.logprobs(model, each.token_ids + found.token_ids, temperature)[len(each.token_ids) - 1 :]
        assert worst(found.logprobs, expected) < EXACT


@pytest.mark.parametrize("truncation", [Truncation(top_k=3), Truncation(top_p=0.5), Truncation(min_p=0.3)], ids=str)
def test_logprobs_of_truncated_sampling_are_over_the_kept_tokens(
    tied_engine: VllmEngine, tied_folder: Path, truncation: Truncation
) -> None:
    requests = [replace(request(seed), truncation=truncation) for seed in range(8)]
    sampled, model = run(tied_engine, requests), tiny.load_model(tied_folder)
    for each in requests:
        found = sampled[each.id]
        sequence = torch.tensor([each.token_ids + found.token_ids])
        with torch.no_grad():
            probabilities = model(input_ids=sequence).logits[0].double().softmax(-1)[len(each.token_ids) - 1 : -1]
        ordered, order = probabilities.sort(-1, descending=True)
        kept = {
            "top_k": torch.arange(ordered.shape[-1]) < (truncation.top_k or ordered.shape[-1]),
            "top_p": ordered.cumsum(-1) - ordered < truncation.top_p,
            "min_p": ordered >= truncation.min_p * ordered[:, :1],
        }
        rest = ordered * (kept["top_k"] & kept["top_p"] & kept["min_p"])
        logprobs = torch.zeros_like(rest).scatter(-1, order, (rest / rest.sum(-1, keepdim=True)).log())
        expected = logprobs.gather(-1, torch.tensor(found.token_ids)[:, None])[:, 0]
        assert worst(found.logprobs, expected.tolist()) < EXACT


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(tied_engine: VllmEngine) -> None:
    requests = [request(seed) for seed in range(12)]
    batched = run(tied_engine, requests)
    alone = [run(tied_engine, [each])[each.id] for each in reversed(requests)]
    assert [found.token_ids for found in reversed(alone)] == [batched[each.id].token_ids for each in requests]


def test_a_response_ends_with_its_end_of_sequence_token(tied_engine: VllmEngine) -> None:
    sampled = run(tied_engine, [request(seed, max_tokens=50) for seed in range(60)])
    stopped = [found for found in sampled.values() if found.finish_reason == "stop"]
    assert stopped
    assert all(found.token_ids[-1] == tiny.EOS and tiny.EOS not in found.token_ids[:-1] for found in stopped)
    assert all(len(found.token_ids) == len(found.logprobs) for found in sampled.values())
    assert all(len(found.token_ids) == 50 for found in sampled.values() if found.finish_reason == "length")


def test_an_aborted_request_returns_nothing_more(tied_engine: VllmEngine) -> None:
    tied_engine.add(request(1))
    tied_engine.add(request(2))
    tied_engine.step()
    tied_engine.abort(["1"])
    seen = set()
    while tied_engine.has_work():
        seen |= {new.id for new in tied_engine.step()}
    assert seen == {"2"}


def test_probing_loses_no_tokens_of_active_requests(tied_engine: VllmEngine) -> None:
    whole = run(tied_engine, [request(3)])["3"]
    tied_engine.add(request(3))
    tokens = tied_engine.step()[0].token_ids
    tied_engine.logprobs(tiny.PROBE_PROMPTS)
    while tied_engine.has_work():
        tokens += [token for new in tied_engine.step() for token in new.token_ids]
    assert tokens == whole.token_ids


def test_load_raises_while_a_request_is_active(tied_engine: VllmEngine, tied_folder: Path) -> None:
    tied_engine.add(request(1))
    tied_engine.step()
    sequence = list(tiny.PROBE_PROMPTS[0])
    before = tiny.load_model(tied_folder)
    after = tiny.checkpoint(tiny.after_one_step(before, 5e-2))
    with pytest.raises(EngineError, match="cannot load version 1"):
        tied_engine.load(after, version=1)
    assert close_to(before)(sequence, tied_engine.logprobs([sequence])[0])
    tied_engine.abort(["1"])
    tied_engine.load(tiny.checkpoint(before), version=1)


def test_logprobs_of_a_loaded_version_match_transformers(engine: VllmEngine, folder: Path) -> None:
    before = tiny.load_model(folder)
    after = tiny.after_one_step(before, 5e-2)
    sequences = [list(prompt) for prompt in tiny.PROBE_PROMPTS]
    assert all(map(close_to(before), sequences, engine.logprobs(sequences)))
    for version, model in ((1, after), (2, before), (3, after)):
        run(engine, [request(0)])
        engine.load(tiny.checkpoint(model), version=version)
        assert all(map(close_to(model), sequences, engine.logprobs(sequences)))
    sampled = run(engine, [request(0)])["0"]
    expected = tiny.logprobs(after, [*PROMPT, 8, *sampled.token_ids])[len(PROMPT) :]
    assert worst(sampled.logprobs, expected) < EXACT


def close_to(model: Any) -> Any:
    return lambda sequence, found: worst(found, tiny.logprobs(model, sequence)) < EXACT


def test_all_weights_are_loaded_through_a_file(folder: Path) -> None:
    engine = VllmEngine(str(folder), engine_args={}, max_model_len=64, seed=0, dtype="float32")
    model = tiny.after_one_step(tiny.load_model(folder), 5e-2)
    engine._load_through_a_file(tiny.checkpoint(model))
    sequence = list(tiny.PROBE_PROMPTS[0])
    assert close_to(model)(sequence, engine.logprobs([sequence])[0])
    engine.close()


def settings(**engine_args: Any) -> dict[str, Any]:
    return engine_settings("m", engine_args=engine_args, max_model_len=9000, seed=1, dtype="float32", on_cpu=True)


def test_engine_settings_are_passed_on_by_name() -> None:
    passed = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "dtype": "bfloat16", "max_num_seqs": 7}
    assert passed.items() <= settings(**passed).items()


def test_chunked_prefill_is_off_on_a_cpu() -> None:
    assert settings()["enable_chunked_prefill"] is False
    assert settings()["max_num_batched_tokens"] >= 9000


def test_several_workers_do_not_share_one_process() -> None:
    assert settings()["distributed_executor_backend"] == "uni"
    assert "distributed_executor_backend" not in settings(tensor_parallel_size=2)


def test_a_setting_that_exact_logprobs_depend_on_is_refused() -> None:
    with pytest.raises(InputError, match=r"rollout_actors.engine.logprobs_mode"):
        settings(logprobs_mode="raw_logits")


def test_the_known_arguments_are_those_of_vllm() -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert known_arguments() == EngineArgs.__dataclass_fields__.keys()


def test_a_sequence_as_long_as_the_context_is_scored(tied_folder: Path) -> None:
    config = RolloutActorsConfig(max_prompt_tokens=100, max_response_tokens=28, engine={"max_num_seqs": 4})
    engine = build_vllm(config, model_path=str(tied_folder), dtype="float32", seed=0, max_tokens=128)
    sequence = [5 + i % 30 for i in range(128)]
    (found,) = engine.logprobs([sequence])
    assert worst(found, tiny.logprobs(tiny.load_model(tied_folder), sequence)) < EXACT
    with pytest.raises(InputError, match="vLLM refuses to score a sequence of 130 tokens"):
        engine.logprobs([sequence, [5] * 130])
    with pytest.raises(InputError, match="vLLM refuses a request of 130 tokens"):
        engine.add(SamplingRequest("long", [5] * 130, 1, 0, 1.0))
    assert not engine.has_work()
    engine.close()


def test_the_error_names_an_unknown_engine_setting(tied_folder: Path) -> None:
    with pytest.raises(InputError, match=r"rollout_actors.engine.max_num_seq: vLLM has no engine argument"):
        VllmEngine(str(tied_folder), engine_args={"max_num_seq": 1}, max_model_len=64, seed=0, dtype="float32")


def test_a_setting_that_vllm_refuses_is_an_input_error(tied_folder: Path) -> None:
    with pytest.raises(InputError, match=r"rollout_actors.engine: vLLM refuses"):
        VllmEngine(str(tied_folder), engine_args={"max_model_len": 4096}, max_model_len=64, seed=0, dtype="float32")
