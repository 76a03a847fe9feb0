"""Every path gives the ids of `apply_chat_template`, and text never changes the number of turns."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.data.chat_template import render
from cluster.data.control_tokens import answer_spellings, control_spellings
from cluster.data.text_tokens import token_ids
from cluster.errors import InputError
from rollout_actors.conversations.transcript import Transcript
from rollout_actors.prompts import PromptTokenizer
from tests.conformance.conversations import TURNS, cases_of
from tests.conformance.paths import PATHS, loaded, models
from tests.conformance.tokenizers import SOURCES, NotAvailable, model_folder
from tests.support.chat import assistant, user

pytestmark = pytest.mark.slow
PLAIN = "x"


@pytest.fixture(params=SOURCES, scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    return available(request.param)


def available(name: str) -> Path:
    """Return the folder of a tokenizer; skips the test if it cannot be downloaded."""
    try:
        return model_folder(name)
    except NotAvailable as error:
        pytest.skip(str(error))


def test_every_path_gives_the_ids_of_the_chat_template(folder: Path, tmp_path: Path) -> None:
    cases = cases_of(SOURCES[folder.name.rpartition("-")[0]])
    for model in models(folder, tmp_path, cases):
        for path, function in PATHS.items():
            for name, found in function(model).items():
                if found is not None:
                    ours, expected = found
                    assert ours == expected, difference(model.tokenizer, path, name, ours, expected)


def difference(tokenizer: Any, path: str, case: str, ours: Sequence[int], expected: Sequence[int]) -> str:
    """Describe two sequences of ids from the first token on in which they differ."""
    pairs = zip([*ours, None], [*expected, None], strict=False)
    start = next((place for place, (a, b) in enumerate(pairs) if a != b), 0)
    parts = [tokenizer.convert_ids_to_tokens(ids[max(0, start - 5) : start + 15]) for ids in (ours, expected)]
    return f"{path}, {case}, token {start}:\nours     {parts[0]}\nexpected {parts[1]}"


def forging_texts(tokenizer: Any) -> st.SearchStrategy[str]:
    """Return texts in which control tokens are spelled, whole and in parts."""
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    control = [token for token in tokens if control_spellings(tokenizer).spans(token)]
    words = sorted(control, key=len)[-12:] + control[:40] + ["a ", "<", "|>", "[", "]", "\n", " ", "\n\n", "é"]
    cut = st.builds(lambda word, end: word[:end], st.sampled_from(words), st.integers(1, 20))
    piece = st.one_of(st.sampled_from(words), cut, cut.map(lambda text: text[::-1]))
    return st.lists(piece, min_size=1, max_size=6).map("".join)


@functools.lru_cache(maxsize=2)
def control_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that no message may make."""
    spellings = answer_spellings(tokenizer)
    return {id for id, token in tokenizer.added_tokens_decoder.items() if spellings.spans(str(token))}


def marks(tokenizer: Any, ids: Sequence[int]) -> Counter[int]:
    """Return how often each control token occurs."""
    control = control_ids(tokenizer)
    return Counter(id for id in ids if id in control)


def conversation_ids(tokenizer: PromptTokenizer, texts: Sequence[str]) -> list[int]:
    """Return the tokens of a conversation in which the policy answers with one token and its end each time."""
    transcript = Transcript(tokenizer, [user(texts[0])])
    for text in texts[1:]:
        transcript.respond([tokenizer.encode_part(PLAIN)[0], tokenizer.tokenizer.eos_token_id])
        transcript.observe([user(text)])
    return transcript.token_ids


def test_texts_never_change_the_number_of_turns(folder: Path) -> None:
    prompts = loaded(folder)
    tokenizer = prompts.tokenizer
    roles = [message["role"] for message in TURNS]

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(forging_texts(tokenizer), min_size=3, max_size=3))
    def check(texts: list[str]) -> None:
        for is_prompt in (True, False):
            said = [
                [assistant(text) if role == "assistant" else user(text) for role, text in zip(roles, each, strict=True)]
                for each in (texts, [PLAIN] * len(texts))
            ]
            rendered = [render(tokenizer, messages, "row", is_prompt=is_prompt) for messages in said]
            forged, plain = (marks(tokenizer, ids) for ids in token_ids(tokenizer, rendered))
            assert forged == plain, (texts, rendered[0], rendered[0].literals)
        forged, plain = (marks(tokenizer, conversation_ids(prompts, each)) for each in (texts, [PLAIN] * len(texts)))
        assert forged == plain, texts

    check()


@pytest.mark.parametrize("name", ["mistral_nemo", "llama2", "gemma3"])
def test_two_messages_of_the_user_in_a_row_are_an_error_of_their_row(name: str) -> None:
    tokenizer = loaded(available(name)).tokenizer
    with pytest.raises(InputError, match=r"the chat template refuses it: .*alternate") as error:
        render(tokenizer, [user("a"), user("b")], "rows.jsonl, line 3", is_prompt=True)
    assert error.value.where == "rows.jsonl, line 3"
