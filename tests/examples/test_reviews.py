"""The reviews task: grammar, oracle, annotators, tokenizer and data."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deploy.config.load import load_run_config
from examples.reviews.annotator import annotate
from examples.reviews.data import build_data
from examples.reviews.grammar import WORDS, all_prompts, sample_review, topic_of
from examples.reviews.metrics import evaluate
from examples.reviews.model import build_model
from examples.reviews.oracle import is_grammatical, oracle, praise

PROMPT = "we tried the new film on friday night:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews")
    build_model(path / "model", seed=0)
    build_data(path / "data", seed=0)
    return path


def column(path: Path, name: str) -> list[str]:
    values: list[str] = pq.read_table(path).column(name).to_pylist()
    return values


def test_sampled_reviews_are_grammatical_and_cover_the_oracles_range() -> None:
    choice = random.Random(0)
    reviews = [(prompt, sample_review(str(topic_of(prompt)), choice)) for prompt in all_prompts() * 3]
    assert all(is_grammatical(prompt, review) for prompt, review in reviews)
    assert {praise(review) for _, review in reviews} == {float(value) for value in range(-4, 5)}


@pytest.mark.parametrize(
    "response",
    [
        "",
        "the film was good",
        "the book was good.",
        "the film was good. the acting was good.",
        "the film was lovely and good.",
        "the film was good and good.",
        "the film was good, the plot was good.",
        "the film was good and lovely but superb.",
        "great great great great",
        "the film was good.\nthe film was good.",
    ],
)
def test_what_is_not_a_review_of_the_prompts_topic_is_not_grammatical(response: str) -> None:
    assert not is_grammatical(PROMPT, response)


def test_spaces_before_punctuation_do_not_make_a_review_ungrammatical() -> None:
    assert is_grammatical(PROMPT, "the film was good , the acting was bad but superb .")
    assert not is_grammatical("tell me about rome", "the film was good.")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("the film was good and lovely, the acting was great but superb.", 4.0),
        ("the film was bad but lovely, the acting was long.", 0.0),
        ("the film was awful.", -1.0),
        ("goodness, a film", 0.0),
        ("superb " * 24, 4.0),
    ],
)
def test_the_oracle_counts_praise_minus_blame_up_to_four(response: str, expected: float) -> None:
    assert oracle([PROMPT], [response]) == [expected]


def test_annotators_prefer_by_the_oracle_with_bradley_terry_noise() -> None:
    prompts, good, bad = [PROMPT] * 4000, ["the film was good."] * 4000, ["the film was bad."] * 4000
    first_loses = annotate(prompts, bad, good, seed=1)
    assert sum(first_loses) / 4000 == pytest.approx(0.881, abs=0.02)  # sigmoid(2)
    assert sum(annotate(prompts, good, good, seed=1)) / 4000 == pytest.approx(0.5, abs=0.03)
    assert first_loses == annotate(prompts, bad, good, seed=1) != annotate(prompts, bad, good, seed=2)


def test_metrics_are_means_over_the_responses() -> None:
    responses = ["the film was good.", "the film was bad.", "good good"]
    assert evaluate([PROMPT] * 3, responses) == pytest.approx(
        {"oracle": 2 / 3, "positive": 2 / 3, "grammatical": 2 / 3}
    )


def test_prompts_and_responses_joined_as_text_are_the_tokens_joined(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    choice = random.Random(0)
    first_word = len(tokenizer) - len(WORDS) - 3
    for prompt in choice.sample(all_prompts(), 200):
        prompt_ids = tokenizer(prompt).input_ids
        assert prompt_ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in prompt_ids
        sampled = [choice.randrange(first_word, len(tokenizer)) for _ in range(choice.randrange(24))]
        response = tokenizer.decode([*sampled, tokenizer.eos_token_id], skip_special_tokens=True)
        joined = tokenizer(prompt + response + tokenizer.eos_token).input_ids
        assert joined == [*prompt_ids, *sampled, tokenizer.eos_token_id]


def test_a_review_is_the_same_after_tokens_and_fits_the_run_files_limits(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    limits = load_run_config(Path("examples/reviews/run.toml")).rollout_actors
    prompts, reviews = (column(folder / "data/sft.parquet", name) for name in ("prompt", "completion"))
    ids = tokenizer(reviews, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert tokenizer.batch_decode(ids) == reviews
    assert max(map(len, ids)) + 1 <= limits.max_response_tokens
    assert max(map(len, tokenizer(prompts).input_ids)) <= limits.max_prompt_tokens


def test_the_model_is_small_fp32_and_has_heads_that_cpu_attention_supports(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "model")
    assert (config.head_dim, str(config.dtype)) == (32, "torch.float32")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert 100_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(folder / "model").eos_token_id


def test_no_evaluation_prompt_is_trained_on(folder: Path) -> None:
    held_out = column(folder / "data/evaluation.parquet", "prompt")
    trained = {*column(folder / "data/prompts.parquet", "prompt"), *column(folder / "data/sft.parquet", "prompt")}
    assert len(set(held_out)) == len(held_out) >= 512
    assert not trained & set(held_out)


def test_the_same_seed_makes_the_same_files_and_another_seed_makes_others(folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        build_model(tmp_path / str(seed) / "model", seed=seed)
        build_data(tmp_path / str(seed) / "data", seed=seed)
    for name in ("model/model.safetensors", "data/sft.parquet", "data/evaluation.parquet"):
        made = (folder / name).read_bytes()
        assert made == (tmp_path / "0" / name).read_bytes()
        assert made != (tmp_path / "1" / name).read_bytes()
