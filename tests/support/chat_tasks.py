"""Checks that the tests of all chat tasks share: data, tokens and model size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.config.load import load_run_config

MAX_PARAMETERS = 3_000_000
FILES = ("sft", "prompts", "evaluation")
Builder = Callable[..., None]


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def require_built_from_the_seed_alone(build_data: Builder, folder: Path) -> None:
    """Require equal files from equal seeds, other files from another seed, and no held-out prompt in training data."""
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        build_data(folder / name, seed=seed)
    for file in (f"{name}.parquet" for name in FILES):
        first, again, other = ((folder / name / file).read_bytes() for name in ("first", "again", "other"))
        assert first == again != other
    held_out = [row["prompt"][0]["content"] for row in rows(folder / "first/evaluation.parquet")]
    assert len(set(held_out)) == len(held_out) >= load_run_config_of(build_data).evaluation.num_prompts
    for name in ("sft", "prompts"):
        assert not {row["prompt"][0]["content"] for row in rows(folder / f"first/{name}.parquet")} & set(held_out)


def require_tokens_keep_the_text(build_model: Builder, data: Path, model: Path) -> None:
    """Require that prompts and demonstrations decode to the same text, without unknown tokens, within the limits."""
    build_model(model, seed=0)
    tokenizer, limits = AutoTokenizer.from_pretrained(model), load_run_config_of(build_model).rollout_actors
    for row in rows(data / "sft.parquet")[:500] + rows(data / "evaluation.parquet"):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in prompt_ids
        assert len(prompt_ids) <= limits.max_prompt_tokens
        if "completion" not in row:
            continue
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        assert ids[: len(prompt_ids)] == prompt_ids
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) - len(prompt_ids) <= limits.max_response_tokens
        response = tokenizer.batch_decode([ids[len(prompt_ids) :]], skip_special_tokens=True)
        assert response == [row["completion"][0]["content"]]


def require_small_model(model: Path) -> None:
    """Require few parameters in fp32, and a head size that vLLM's attention on a CPU supports."""
    built = AutoModelForCausalLM.from_pretrained(model)
    assert sum(parameter.numel() for parameter in built.parameters()) <= MAX_PARAMETERS
    assert (built.config.head_dim, str(built.config.dtype)) == (32, "torch.float32")


def load_run_config_of(builder: Builder) -> Any:
    """Load the run file in the folder of a builder."""
    return load_run_config(Path("examples") / builder.__module__.split(".")[1] / "run.toml")
