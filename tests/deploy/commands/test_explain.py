"""The transcript of a conversation, and its page, which escapes all text of the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.errors import InputError
from cluster.trajectory import Segment, Trajectory, Turn
from deploy.commands.history.explanation_page import write_page
from deploy.commands.history.transcript import Transcript, spans_of

WORDS = ["<script>alert(1)</script>", '"><img src=x onerror=y>', "go", "on\x1b[2J", " &amp; up", "\u202eend"]
VALUES = SimpleNamespace(
    values=[0.0, 0.5, 0.25, 0.0, 0.125, 0.0],
    advantages=[0.0, -1.0, 2.0, 0.0, 0.5, 0.0],
    before=[0.0, -1.0, -2.0, 0.0, -0.5, 0.0],
    after=[0.0, -1.25, -1.0, 0.0, -0.25, 0.0],
)
TRAJECTORY = Trajectory(
    uid="0-3-0",
    group=3,
    task="game",
    token_ids=[0, 1, 2, 3, 4, 5],
    mask=[False, True, True, False, True, False],
    behavior_logprobs=[0.0, -1.0, -2.0, 0.0, -0.5, 0.0],
    segments=[Segment(4, 1, 2, 1, "a"), Segment(5, 4, 1, 2, "a")],
    turns=[Turn(1, 2, 0.5), Turn(4, 1, -0.25)],
    admission_index=3,
    finish_reason="stop",
    reward=1.0,
    reward_parts={"won</div>": 1.0},
    step=6,
)


def decode(token_ids: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in token_ids)


def transcript() -> Transcript:
    return Transcript("game<b>", TRAJECTORY, spans_of(TRAJECTORY, VALUES, decode), "from version 5")


def test_a_transcript_has_all_spans_with_rewards_and_token_values() -> None:
    given, first, between, second, last = transcript().spans
    assert [span.is_sampled for span in transcript().spans] == [False, True, False, True, False]
    assert (given.text, between.text, last.text) == (WORDS[0], WORDS[3], WORDS[5])
    assert [token.text for token in first.tokens] == WORDS[1:3]
    assert [(t.value, t.advantage, t.before, t.change) for t in first.tokens] == [
        (0.5, -1.0, -1.0, -0.25),
        (0.25, 2.0, -2.0, 1.0),
    ]
    assert (first.heading(), second.heading()) == ("turn 1: 2 tokens, reward 0.5", "turn 2: 1 token, reward -0.25")
    assert transcript().heading() == "game<b>: 0-3-0 of task game, trained in step 6, sampled by version 4, 5"
    assert list(transcript().summary()) == [
        "finish reason: stop",
        "reward 1.25: 0.25 from turns, 1 at the end",
        "  won</div> 1",
    ]


def test_a_token_is_decoded_in_the_context_of_the_tokens_before_it() -> None:
    def spaced(token_ids: Sequence[int]) -> str:
        return " ".join("abcdef"[token] for token in token_ids)

    spans = spans_of(TRAJECTORY, VALUES, spaced)
    assert [token.text for token in spans[1].tokens] == [" b", " c"]


class Page(HTMLParser):
    """Parses a page: its elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_escapes_the_conversation_and_loads_nothing(tmp_path: Path) -> None:
    write_page(transcript(), tmp_path / "why.html")
    page = Page((tmp_path / "why.html").read_text())
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "b", "link", "iframe", "form"}
    attributes = {name for _, found in page.elements for name in found}
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")]
    policy = next(found["content"] for tag, found in page.elements if found.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    for text in ("<script>alert(1)</script>", '"><img src=x onerror=y>', "on\\x1b[2J", "&amp; up", "\\u202eend"):
        assert text in page.text
    styles = [found["style"] for tag, found in page.elements if tag == "span"]
    assert styles == ["--opacity:0.275", "--opacity:0.550", "--opacity:0.138"]


def test_explain_names_the_page_if_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--html: .* cannot be written"):
        write_page(transcript(), tmp_path)
