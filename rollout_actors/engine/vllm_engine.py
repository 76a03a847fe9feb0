"""The generation engine on vLLM.

On a CPU vLLM runs in this process, because two processes would halve the tokens per second; elsewhere vLLM's defaults
apply and its core runs in a separate process. The same calls serve both. vLLM is imported when an engine is built,
after its environment variables are set.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import EngineError, InputError
from rollout_actors.engine.arguments import SECTION, check_arguments
from rollout_actors.engine.protocol import Sampled, SamplingRequest

if TYPE_CHECKING:
    import torch

CPU_KV_CACHE_BYTES = 256 * 2**20
CPU_BATCHED_TOKENS = 4096
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    # To score a sequence as long as the context, vLLM wants room for one token more, which is not computed.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
REFUSALS = (ValueError, TypeError, KeyError, NotImplementedError)
"""What vLLM raises for settings, weights and requests that it does not take: they would fail again after a restart."""


def engine_settings(
    model_path: str, *, engine_args: Mapping[str, Any], max_model_len: int, seed: int, dtype: str, on_cpu: bool
) -> dict[str, Any]:
    """Return vLLM's engine arguments: ours, overridden by the user's `engine_args`.

    Raises InputError for arguments that must not be changed for exact log-probabilities and proved swaps.
    """
    check_arguments(engine_args)
    settings: dict[str, Any] = {
        "model": model_path,
        "config_format": "hf",
        "load_format": "hf",
        "tokenizer_mode": "hf",
        "dtype": dtype,
        "seed": seed,
        "max_model_len": max_model_len,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "rollout_actors.engine.vllm_worker.WeightLoading",
        "disable_log_stats": True,
        "trust_remote_code": False,
    }
    if on_cpu:
        settings |= _cpu_settings(engine_args, max_model_len)
    return settings | dict(engine_args) | _with_room(engine_args.get("max_model_len"))


def _with_room(max_model_len: Any) -> dict[str, int]:
    """Return the user's length with room for the token that scoring a whole sequence needs."""
    return {"max_model_len": max_model_len + 1} if isinstance(max_model_len, int) and max_model_len > 0 else {}


def _cpu_settings(engine_args: Mapping[str, Any], max_model_len: int) -> dict[str, Any]:
    """Return the settings for a CPU.

    No chunked prefill: the CPU's random generators have no offset for it.
    """
    settings: dict[str, Any] = {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, CPU_BATCHED_TOKENS),
    }
    if _fits_one_process(engine_args):
        settings["distributed_executor_backend"] = "uni"
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        settings["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return settings


def _fits_one_process(engine_args: Mapping[str, Any]) -> bool:
    sizes = (engine_args.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data"))
    return all(size == 1 for size in sizes)


def _prepare_environment(engine_args: Mapping[str, Any]) -> bool:
    """Set vLLM's environment variables unless the user has, and return whether the engine runs on a CPU."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if _fits_one_process(engine_args) else "1"
    return on_cpu


class VllmEngine:
    """Implements GenerationEngine with vLLM's LLMEngine.

    It is warm when the constructor returns, and for one thread only. Returns every token with its log-probability at
    the sampling temperature, over the tokens that may be sampled. Sampling ends with the tokenizer's end-of-sequence
    token, which is returned too. Raises InputError for settings that vLLM refuses.
    """

    def __init__(
        self, model_path: str, *, engine_args: Mapping[str, Any], max_model_len: int, seed: int, dtype: str
    ) -> None:
        on_cpu = _prepare_environment(engine_args)
        settings = engine_settings(
            model_path, engine_args=engine_args, max_model_len=max_model_len, seed=seed, dtype=dtype, on_cpu=on_cpu
        )
        self._engine = _build(settings)
        self._in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0"
        self._probe_ids = itertools.count()
        self._held_back: list[Sampled] = []
        self._warm_up()

    def _warm_up(self) -> None:
        """Run a request and a probe, so that later ones need not wait for kernels and buffers."""
        self.add(SamplingRequest(id="warm-up", token_ids=[0, 0], max_tokens=2, seed=0, temperature=1.0))
        while self.has_work():
            self.step()
        self.logprobs([[0, 0, 0]])

    def add(self, request: SamplingRequest) -> None:
        """Add a request. Every `step` advances it."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.truncation.top_p,
            top_k=request.truncation.top_k,
            min_p=request.truncation.min_p,
            seed=request.seed,
            max_tokens=request.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
        )
        with _refusals(f"a request of {len(request.token_ids)} tokens"):
            self._engine.add_request(request.id, tokens_input(list(request.token_ids)), params)

    def step(self) -> list[Sampled]:
        """Advance every active request by about one token and return the new tokens."""
        held_back, self._held_back = self._held_back, []
        return held_back + [_sampled(output) for output in self._engine.step()]

    def abort(self, ids: Sequence[str]) -> None:
        """Cancel these requests. Nothing more is returned for them."""
        self._engine.abort_request(list(ids))
        cancelled = set(ids)
        self._held_back = [sampled for sampled in self._held_back if sampled.id not in cancelled]

    def has_work(self) -> bool:
        """Return whether a request is active."""
        return bool(self._held_back) or bool(self._engine.has_unfinished_requests())

    def load(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Replace all weights by a version in checkpoint form.

        Raises EngineError, and replaces nothing, if a request is active: it would continue to read the cache of the old
        weights, and the proof would not notice, because probes do not read the cache.
        """
        if not self._engine.reset_prefix_cache():
            raise EngineError(
                SECTION, f"cannot load version {version}: an active request still uses the cache of the last one"
            )
        with _refusals(f"the weights of version {version}"):
            if self._in_process:
                self._engine.collective_rpc("load_tensors", args=(tensors,))
            else:
                self._load_through_a_file(tensors)
        self._engine.set_weight_version(str(version))

    def _load_through_a_file(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load from a file in shared memory, for workers in other processes: no tensor is pickled."""
        from safetensors.torch import save_file

        shared_memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
            path = str(Path(folder) / "weights.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            self._engine.collective_rpc("load_file", args=(path,))

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each token but the first given its prefix, at temperature 1.

        Does not read the prefix cache. Active requests advance meanwhile; the next `step` returns their new tokens.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = [f"probe-{next(self._probe_ids)}" for _ in sequences]
        try:
            for id_, sequence in zip(ids, sequences, strict=True):
                with _refusals(f"to score a sequence of {len(sequence)} tokens"):
                    self._engine.add_request(id_, tokens_input(list(sequence)), params)
        except InputError:
            self._engine.abort_request(ids)
            raise
        found: dict[str, list[float]] = {}
        waiting = set(ids)
        while waiting:
            for output in self._engine.step():
                if output.request_id in waiting:
                    waiting.remove(output.request_id)
                    found[output.request_id] = list(output.prompt_logprobs.logprobs)
                else:
                    self._held_back.append(_sampled(output))
        return [found[id_] for id_ in ids]

    def close(self) -> None:
        """Free memory and end processes."""
        self._engine.engine_core.shutdown()


def _sampled(output: Any) -> Sampled:
    completion = output.outputs[0]
    return Sampled(
        output.request_id, list(completion.token_ids), list(completion.logprobs.logprobs), completion.finish_reason
    )


def _build(settings: Mapping[str, Any]) -> Any:
    """Build vLLM's engine. Raises InputError naming the argument that vLLM does not know or refuses."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    with _refusals(f"the settings of the engine or the model in {settings['model']}"):
        config = EngineArgs(**settings).create_engine_config()
        return LLMEngine.from_vllm_config(config, disable_log_stats=settings["disable_log_stats"])


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Raise vLLM's refusals in the block as InputError: a restart of the engine would not help."""
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (*REFUSALS, VLLMClientError) as error:
        raise InputError(SECTION, f"vLLM refuses {what}: {error}") from error
