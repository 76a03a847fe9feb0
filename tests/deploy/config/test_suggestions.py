"""Test the suggestions for unknown keys."""

from __future__ import annotations

import pytest

from deploy.config.suggestions import suggest


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("learner.lr", "learner.learning_rate"),
        ("learner.beta", "did you mean learner.kl_coefficient?"),
        ("dpo.loss_type", "did you mean dpo.loss?"),
        ("run.beta", "did you mean learner.kl_coefficient or dpo.beta?"),
        ("rollout_actors.num_generations", "did you mean rollout_actors.responses_per_prompt"),
        ("rollout_actors.max_completion_length", "did you mean rollout_actors.max_response_tokens?"),
        ("learner.epsilon", "learner.clip"),
        ("rollout_actors.stop_strings", "did you mean rollout_actors.stop?"),
        ("rollout_actors.repetition_penalty", "responses are sampled from the whole distribution"),
        ("learner.learning_rte", "did you mean learner.learning_rate"),
    ],
)
def test_our_key_is_suggested_for_a_typo_or_another_trainers_key(key: str, words: str) -> None:
    assert words in suggest(key)


def test_a_similar_key_of_the_section_is_suggested() -> None:
    assert suggest("sft.num_step", ["num_steps", "batch_size"]) == " (did you mean num_steps?)"


def test_an_unlike_key_has_no_suggestion() -> None:
    assert suggest("learner.zzzzzz", ["clip"]) == ""
