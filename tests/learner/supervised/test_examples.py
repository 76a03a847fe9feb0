"""Rows of each of TRL's forms become tokens; long ones are treated as the setting says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from cluster.data.chat_settings import ChatSettings
from cluster.errors import InputError
from learner.config import RewardModelConfig, SftConfig
from learner.supervised.examples import Completion, Limit, Pair, read_completions, read_pairs
from learner.supervised.sft import num_learnt
from tests.support.chat import TEMPLATE, assistant, make_tokenizer, user

SYSTEM = {"role": "system", "content": "be brief"}
TOKENIZER = make_tokenizer()


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(example: Completion) -> tuple[str, str]:
    """Decode prompt and completion of an example, with special tokens."""
    ids, num_prompt, _ = example
    return TOKENIZER.decode(ids[:num_prompt]), TOKENIZER.decode(ids[num_prompt:])


def test_texts_are_prompt_completion_and_end_of_sequence(tmp_path: Path) -> None:
    (example,) = read_completions(TOKENIZER, written(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cd"}))
    assert texts(example) == ("<bos>ab", "cd<eos>")


def test_a_conversation_is_split_before_its_last_answer(tmp_path: Path) -> None:
    talk = [SYSTEM, user("ab"), assistant("no"), user("cd"), assistant("ef"), user("left out")]
    (example,) = read_completions(TOKENIZER, written(tmp_path / "a.jsonl", {"messages": talk}))
    prompt = "<bos>[system]be brief<eos>\n[user]ab<eos>\n[assistant]no<eos>\n[user]cd<eos>\n[assistant]"
    assert texts(example) == (prompt, "ef<eos>\n")
    assert example.token_ids == TOKENIZER.apply_chat_template(talk[:5], return_dict=False)


def trained(example: Completion) -> list[str]:
    """Decode the parts of an example that are trained."""
    ids, num_prompt, earlier = example
    return [TOKENIZER.decode(ids[start:end]) for start, end in (*earlier, (num_prompt, len(ids)))]


def test_every_answer_of_a_conversation_is_trained_unless_only_the_last_is(tmp_path: Path) -> None:
    talk = [SYSTEM, user("ab"), assistant("no"), user("cd"), assistant("ef")]
    path = written(tmp_path / "a.jsonl", {"messages": talk})
    (every,), (last,) = read_completions(TOKENIZER, path), read_completions(TOKENIZER, path, train_on="last")
    assert trained(every) == ["no<eos>", "ef<eos>\n"]
    assert trained(last) == ["ef<eos>\n"]
    assert every.token_ids == last.token_ids == TOKENIZER.apply_chat_template(talk, return_dict=False)
    assert num_learnt(every) == num_learnt(last) + len("no") + 1


def test_a_cut_example_keeps_the_answers_that_fit() -> None:
    example = Completion(list(range(10)), 7, ((2, 5),))
    assert example.cut(8) == Completion(list(range(8)), 7, ((2, 5),))
    assert example.cut(4) == Completion(list(range(4)), 4, ((2, 4),))
    assert example.cut(2) is None


def test_a_prompt_and_a_completion_of_messages_are_one_conversation(tmp_path: Path) -> None:
    row = {"prompt": [user("ab")], "completion": [assistant("cd"), user("ef"), assistant("gh")]}
    (example,) = read_completions(TOKENIZER, written(tmp_path / "a.jsonl", row))
    assert texts(example) == ("<bos>[user]ab<eos>\n[assistant]cd<eos>\n[user]ef<eos>\n[assistant]", "gh<eos>\n")
    assert trained(example) == ["cd<eos>", "gh<eos>\n"]


def test_an_end_of_sequence_is_added_if_the_template_has_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATE.replace("{{ eos_token }}", ""))
    path = written(tmp_path / "a.jsonl", {"messages": [user("ab"), assistant("cd")]})
    assert texts(read_completions(tokenizer, path)[0]) == ("<bos>[user]ab\n[assistant]", "cd\n<eos>")


def test_a_header_that_the_template_adds_unasked_is_left_out(tmp_path: Path) -> None:
    unasked = TEMPLATE.replace("{% if add_generation_prompt %}[assistant]{% endif %}", "[assistant]")
    path = written(tmp_path / "a.jsonl", {"messages": [user("ab"), assistant("cd"), user("e"), assistant("f")]})
    expected = read_completions(TOKENIZER, path)
    assert read_completions(make_tokenizer(unasked), path) == expected
    other_end = unasked.replace("eos_token", "unk_token")
    assert texts(read_completions(make_tokenizer(other_end), path)[0])[1] == "f<unk>\n"


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([user("ab")], "no message has the role assistant"),
        ([assistant("ab")], "no message precedes the assistant's"),
    ],
)
def test_an_error_names_the_row_without_prompt_or_answer(
    tmp_path: Path, talk: list[dict[str, str]], message: str
) -> None:
    path = written(tmp_path / "a.jsonl", {"messages": [user("a"), assistant("b")]}, {"messages": talk})
    with pytest.raises(InputError) as error:
        read_completions(TOKENIZER, path)
    assert (error.value.where, error.value.what) == (f"{path}, line 2", message)


def test_an_error_names_the_row_if_the_prompt_renders_differently(tmp_path: Path) -> None:
    changing = make_tokenizer(
        "{{ messages | length if messages[0]['content'] == 'x' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    fine, other = [user("ab"), assistant("cd")], [user("x"), assistant("cd")]
    sft = written(tmp_path / "sft.jsonl", {"messages": fine}, {"messages": other})
    pairs = written(
        tmp_path / "pairs.jsonl",
        *({"prompt": talk[:1], "chosen": talk[1:], "rejected": talk[1:]} for talk in (fine, other)),
    )
    for read, path in ((read_completions, sft), (read_pairs, pairs)):
        with pytest.raises(InputError, match="renders the prompt alone differently") as error:
            read(changing, path)
        assert error.value.where == f"{path}, line 2"


def test_an_error_names_data_and_model_without_a_chat_template(tmp_path: Path) -> None:
    plain = make_tokenizer(template=None)
    plain.name_or_path = "the/model"
    sft = written(tmp_path / "sft.jsonl", {"messages": [user("a"), assistant("b")]})
    pairs = written(tmp_path / "pairs.jsonl", {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]})
    for read, path in ((read_completions, sft), (read_pairs, pairs)):
        with pytest.raises(InputError, match="the tokenizer of the/model has no chat template") as error:
            read(plain, path)
        assert error.value.where == str(path)


def decoded(pair: Pair) -> tuple[str, str]:
    return TOKENIZER.decode(pair.chosen), TOKENIZER.decode(pair.rejected)


def test_preferences_are_read_equally_from_every_form(tmp_path: Path) -> None:
    prompt, chosen, rejected = [SYSTEM, user("ab")], [assistant("cd ")], [assistant("e")]
    text = TOKENIZER.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    rows: list[dict[str, Any]] = [
        {"prompt": text, "chosen": "cd", "rejected": "e"},
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"chosen": prompt + chosen, "rejected": prompt + rejected},
    ]
    trusting = make_tokenizer()
    trusting.chat_settings = ChatSettings(allow_special_tokens=True)
    read = [read_pairs(trusting, written(tmp_path / f"{n}.jsonl", row)) for n, row in enumerate(rows)]
    assert read[0] == read[1] == read[2]
    assert decoded(read[0][0]) == (text + "cd<eos>", text + "e<eos>")
    assert TOKENIZER.decode(read[0][0].chosen[: read[0][0].num_prompt]) == text


def test_preference_texts_get_the_special_tokens_of_a_template(tmp_path: Path) -> None:
    row = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
    (pair,) = read_pairs(TOKENIZER, written(tmp_path / "a.jsonl", row))
    assert decoded(pair) == ("<bos>abcd<eos>", "<bos>abe<eos>")


def test_a_response_includes_the_template_before_it_but_not_after(tmp_path: Path) -> None:
    thinking = make_tokenizer(TEMPLATE.replace("]{{ m[", "]{{ '..' if m['role'] == 'assistant' }}{{ m["))
    row = {"prompt": [user("ab")], "chosen": [assistant("eos")], "rejected": [assistant("")]}
    (pair,) = read_pairs(thinking, written(tmp_path / "a.jsonl", row))
    prompt = "<bos>[user]ab<eos>\n[assistant]"
    assert decoded(pair) == (prompt + "..eos<eos>", prompt + "..<eos>")


def test_an_error_names_the_row_without_a_common_first_message(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}
    )
    with pytest.raises(InputError, match=r"line 1: chosen and rejected have no first message in common"):
        read_pairs(TOKENIZER, path)


def test_a_template_that_cuts_the_answer_is_refused_for_preferences(tmp_path: Path) -> None:
    cutting = make_tokenizer(TEMPLATE.replace("m['content'] | trim", "m['content'][:1]"))
    path = written(tmp_path / "a.jsonl", {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [user("c")]})
    with pytest.raises(InputError, match="line 1: the chat template changes the end of the last message"):
        read_pairs(cutting, path)


def test_margins_are_read_if_present(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert read_pairs(TOKENIZER, written(tmp_path / "a.jsonl", row))[0].margin == 0.0
    assert read_pairs(TOKENIZER, written(tmp_path / "b.jsonl", {**row, "margin": 2}))[0].margin == 2.0
    path = written(tmp_path / "c.jsonl", {**row, "margin": 2}, row)
    with pytest.raises(InputError, match="line 2: column 'margin': expected a number, got None"):
        read_pairs(TOKENIZER, path)


Rule = Literal["error", "drop", "cut"]


def limit(rule: Rule, max_tokens: int | None = 4, context: int | None = 8) -> Limit:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context))
    return Limit.of(model, SftConfig(max_tokens=max_tokens, long_examples=rule), "sft")


FITS, LONG, ALL_PROMPT = Completion([1, 2, 3, 4], 2), Completion([1, 2, 3, 4, 5, 6], 3), Completion([1, 2, 3, 4, 5], 4)


@pytest.mark.parametrize(
    ("rule", "kept", "num_cut"),
    [("drop", [FITS], 0), ("cut", [FITS, Completion([1, 2, 3, 4], 3)], 1)],
)
def test_long_examples_are_dropped_or_cut_and_counted(rule: Rule, kept: list[Completion], num_cut: int) -> None:
    examples, counts = limit(rule).applied([FITS, LONG, ALL_PROMPT], Path("data"))
    assert examples == kept
    assert counts == {"num_examples": len(kept), "num_cut": num_cut, "num_dropped": 3 - len(kept)}


def test_an_error_names_row_and_limit_of_a_long_example_by_default() -> None:
    with pytest.raises(InputError, match=r"^data: row 1: 6 tokens, but sft.max_tokens is 4$"):
        limit("error").applied([FITS, LONG], Path("data"))
    with pytest.raises(InputError, match=r"^data: row 1: 6 tokens, but the model's context is 5$"):
        limit("error", max_tokens=None, context=5).applied([FITS, LONG], Path("data"))


def test_any_length_fits_a_model_without_a_stated_context() -> None:
    examples = [Completion([1] * 10_000, 1)]
    assert limit("error", max_tokens=None, context=None).applied(examples, Path("data"))[0] == examples


def test_a_limit_above_the_context_is_refused() -> None:
    with pytest.raises(InputError, match=r"^sft.max_tokens: 9, but the model's context is 8$"):
        limit("cut", max_tokens=9)


def test_dropping_every_example_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^data: all 2 examples were dropped as too long: sft.max_tokens is 4$"):
        limit("cut").applied([ALL_PROMPT, ALL_PROMPT], Path("data"))


def test_pairs_are_cut_and_dropped_if_their_rest_is_equal() -> None:
    long = Pair([1, 2, 3, 4, 5], [1, 2, 6], 2, 0.5)
    alike = Pair([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], 2)
    pairs, counts = limit("cut").applied([long, alike, Pair([1, 2, 3, 4, 5], [1, 2, 3, 4], 4)], Path("data"))
    assert pairs == [Pair([1, 2, 3, 4], [1, 2, 6], 2, 0.5)]
    assert counts == {"num_examples": 1, "num_cut": 1, "num_dropped": 2}
    assert limit("drop").applied([FITS, LONG], Path("data"))[0] == [FITS]


def test_both_sections_have_the_setting_for_long_examples() -> None:
    for config in (SftConfig(), RewardModelConfig()):
        assert (config.max_tokens, config.long_examples) == (None, "error")
