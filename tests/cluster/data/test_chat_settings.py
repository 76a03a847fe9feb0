"""A model folder's chat settings apply wherever its tokenizer is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.data.chat_settings import SETTINGS_FILE, ChatSettings
from cluster.data.chat_template import joined, render, rendered_halves
from cluster.data.text_tokens import token_ids
from cluster.data.tokenizer import load_tokenizer
from cluster.errors import InputError
from learner.supervised.choices import read_choices
from learner.supervised.examples import Completion, read_completions, read_pairs
from rollout_actors.conversations.transcript import Transcript
from rollout_actors.prompt_screen import ready_rows, rendered_rows
from rollout_actors.prompts import PromptTokenizer
from tests.support.chat import TEMPLATE, assistant, make_tokenizer, user

OPENING = TEMPLATE.replace("[assistant]{% endif %}", "[assistant]<think>\n{% endif %}").replace(
    "m['content'] | trim", "m['content'].split('</think>')[-1] | trim"
)
"""A template that opens the thoughts in the prompt and leaves them out of a finished conversation."""


def folder(path: Path, settings: ChatSettings, template: str | None = TEMPLATE) -> Path:
    make_tokenizer(template).save_pretrained(path)
    settings.write(path)
    return path


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(text: str) -> list[int]:
    found: list[int] = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


def prompt_of(model: Path, path: Path) -> str:
    (ready,) = ready_rows(path, model, max_prompt_tokens=99)
    (rows,) = rendered_rows(ready.rows, model, 99)
    return str(rows[0]["prompt"])


def test_texts_become_messages_in_all_data_sets_and_environments(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", ChatSettings(as_messages=True, system_prompt="be"))
    start = "<bos>[system]be<eos>\n[user]ab<eos>\n[assistant]"
    assert prompt_of(model, written(tmp_path / "a.jsonl", {"prompt": "ab"})) == start
    tokenizer = load_tokenizer(model)
    example = Completion(ids(start + "c<eos>\n"), len(ids(start)))
    assert read_completions(tokenizer, written(tmp_path / "b.jsonl", {"prompt": "ab", "completion": "c"})) == [example]
    pairs = written(tmp_path / "c.jsonl", {"prompt": "ab", "chosen": "c", "rejected": "d"})
    assert [pair.chosen for pair in read_pairs(tokenizer, pairs)] == [ids(start + "c<eos>")]
    assert [pair.chosen for pair in read_choices(tokenizer, pairs)] == [example]
    transcript = Transcript(PromptTokenizer(str(model), max_prompt_tokens=99), "ab")
    transcript.respond(ids("c<eos>"))
    transcript.observe("d")
    assert transcript.token_ids == ids(start + "c<eos>\n[user]d<eos>\n[assistant]")


def test_a_system_prompt_is_put_before_conversations_that_have_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, ChatSettings(system_prompt="be")))
    assert render(tokenizer, [user("a")], "row", is_prompt=True) == "<bos>[system]be<eos>\n[user]a<eos>\n[assistant]"
    own = [{"role": "system", "content": "x"}, user("a")]
    assert render(tokenizer, own, "row", is_prompt=True) == "<bos>[system]x<eos>\n[user]a<eos>\n[assistant]"


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    template = TEMPLATE + "{% if not enable_thinking | default(true) %}no{% endif %}"
    path = written(tmp_path / "a.jsonl", {"prompt": [user("a")]})
    texts = [
        prompt_of(folder(tmp_path / str(number), ChatSettings(kwargs), template), path)
        for number, kwargs in enumerate(({}, {"enable_thinking": False}))
    ]
    assert texts == ["<bos>[user]a<eos>\n[assistant]", "<bos>[user]a<eos>\n[assistant]no"]


def test_a_prefill_is_continued_everywhere(tmp_path: Path) -> None:
    model, prompt = folder(tmp_path / "model", ChatSettings()), [user("a"), assistant("bc ")]
    start = "<bos>[user]a<eos>\n[assistant]bc"
    path = written(tmp_path / "a.jsonl", {"prompt": prompt, "completion": [assistant("d")]})
    assert prompt_of(model, path) == start
    tokenizer = load_tokenizer(model)
    (example,) = read_completions(tokenizer, path)
    assert example == Completion(ids(start + " d<eos>\n"), len(ids(start)))
    pairs = written(tmp_path / "b.jsonl", {"prompt": prompt, "chosen": [assistant("d")], "rejected": [assistant("e")]})
    assert [pair.chosen for pair in read_pairs(tokenizer, pairs)] == [ids(start + " d<eos>")]
    transcript = Transcript(PromptTokenizer(str(model), max_prompt_tokens=99), prompt)
    transcript.respond(ids(" d<eos>"))
    transcript.observe("x")
    assert transcript.token_ids == ids(start + " d<eos>\n[user]x<eos>\n[assistant]")
    assert transcript.messages[1]["content"] == "bc  d"


def test_a_prefill_is_refused_with_its_row_if_set(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", ChatSettings(prefill="refuse"))
    path = written(tmp_path / "a.jsonl", {"prompt": [user("a")]}, {"prompt": [user("a"), assistant("b")]})
    with pytest.raises(InputError, match="the last message is the assistant's") as error:
        prompt_of(model, path)
    assert error.value.where == f"{path}, line 2"


def test_an_answer_follows_thoughts_that_the_prompt_opens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, ChatSettings(), OPENING))
    for content in ("<think>\nwhy</think>so", "why</think>so"):
        prompt, whole = rendered_halves(tokenizer, [user("a")], [assistant(content)], "row")
        assert (prompt, whole) == ("<bos>[user]a<eos>\n[assistant]<think>\n", f"{prompt}why</think>so<eos>\n")
    with pytest.raises(InputError, match="opens <think> in the prompt, but the answer has no </think>"):
        rendered_halves(tokenizer, [user("a")], [assistant("so")], "row 3")


def test_an_answer_follows_the_prompt_as_it_is_sampled(tmp_path: Path) -> None:
    last = "loop.last and m.role == 'user' and messages[0].role == 'system'"
    moving = (
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}[{{ m.role }}]"
        f"{{% if {last} %}}{{{{ messages[0].content }}}}: {{% endif %}}"
        "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = load_tokenizer(folder(tmp_path, ChatSettings(system_prompt="be"), moving))
    prompt, whole = rendered_halves(tokenizer, [user("a")], [assistant("b<eos>")], "row")
    assert (prompt, whole) == ("<bos>[user]be: a[assistant]", "<bos>[user]be: a[assistant]b<eos><eos>")
    assert whole.literals == ((len(prompt) + 1, len(prompt) + 6),)


def test_messages_spell_control_tokens_only_if_allowed(tmp_path: Path) -> None:
    found = [
        token_ids(tokenizer, [render(tokenizer, [user("[user]")], "row", is_prompt=False)])[0].count(ids("[user]")[0])
        for allowed in (False, True)
        for tokenizer in [load_tokenizer(folder(tmp_path, ChatSettings(allow_special_tokens=allowed)))]
    ]
    assert found == [1, 2]


def test_an_answer_is_joined_to_a_prefill_only() -> None:
    assert joined([user("a")], [assistant("b")]) == [user("a"), assistant("b")]
    assert joined([user("a"), assistant("b")], [assistant("c")]) == [user("a"), assistant("bc")]
    called = {"role": "assistant", "content": "", "tool_calls": [{}]}
    assert joined([called], [assistant("c")]) == [called, assistant("c")]


@pytest.mark.parametrize("text", ["[]", "{", '{"colour": 1}'])
def test_an_invalid_settings_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(InputError, match="is not a file of chat settings") as error:
        ChatSettings.of(tmp_path)
    assert error.value.where == str(tmp_path / SETTINGS_FILE)


def test_settings_of_the_run_file_replace_those_of_the_folder() -> None:
    before = ChatSettings({"a": 1}, system_prompt="old", as_messages=True)
    assert ChatSettings(system_prompt="new").over(before) == ChatSettings({"a": 1}, "new", as_messages=True)
