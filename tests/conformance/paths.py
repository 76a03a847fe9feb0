"""The ways by which conversations become tokens here, each with the ids that `apply_chat_template` gives for them.

A path returns pairs of our ids and the expected ones, or None for a case that it does not have.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster.data.chat_settings import ChatSettings
from cluster.data.chat_template import joined, render
from cluster.data.text_tokens import scored_token_ids
from cluster.scoring import ScoreRequest
from deploy.commands.policy.conversation import ChatConversation
from deploy.config.schema import RunConfig
from learner.supervised.choices import read_choices
from learner.supervised.examples import read_completions, read_pairs
from reward_service.client.http import HttpRewardClient
from reward_service.http.schemas import RewardsRequest, parse_json
from rollout_actors.conversations.transcript import Transcript
from rollout_actors.engine.protocol import SamplingRequest
from rollout_actors.prompt_screen import ready_rows, rendered_rows
from rollout_actors.prompts import PromptTokenizer
from tests.conformance.conversations import Case
from tests.support.chat import assistant

MAX_TOKENS = 4096
Ids = list[int]
Found = dict[str, tuple[Ids, Ids] | None]
"""Case -> our ids and the expected ones; None if the path does not have the case."""


class Model(NamedTuple):
    """A tokenizer with the cases that its template knows, all with the same arguments of the template."""

    folder: Path
    work: Path
    cases: Mapping[str, Case]
    kwargs: Mapping[str, Any]

    @property
    def prompts(self) -> PromptTokenizer:
        """Return the tokenizer as rollout actors use it."""
        return loaded(self.folder)

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of transformers."""
        return self.prompts.tokenizer

    def reference(self, messages: Sequence[Any], *, is_prompt: bool, case: Case, tokenize: bool = True) -> Any:
        """Return what transformers makes of a conversation."""
        is_continued = is_prompt and messages[-1]["role"] == "assistant"
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(case.tools) or None,
            tokenize=tokenize,
            add_generation_prompt=is_prompt and not is_continued,
            continue_final_message=is_continued,
            return_dict=False,
            **self.kwargs,
        )

    def whole(self, case: Case) -> str:
        """Return the text of the prompt with its answer, up to the end of the answer's content."""
        messages = joined(case.prompt, [assistant(case.answer)])
        text: str = self.reference(messages, is_prompt=False, case=case, tokenize=False)
        content = case.answer.strip().rpartition("\n\n")[2]
        return text[: text.rindex(content) + len(content)]

    def written(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write rows as a data set."""
        path = self.work / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def without_tools(self) -> dict[str, Case]:
        """Return the cases that data sets can hold."""
        return {name: case for name, case in self.cases.items() if not case.tools}


@functools.lru_cache(maxsize=4)
def loaded(folder: Path) -> PromptTokenizer:
    """Load the tokenizer of a model folder once."""
    return PromptTokenizer(str(folder), max_prompt_tokens=MAX_TOKENS)


def prompts(model: Model) -> Found:
    """Rows of prompts, as they are sampled in training and in evaluation."""
    cases = model.without_tools()
    path = model.written([{"prompt": case.prompt} for case in cases.values()])
    (ready,) = ready_rows(path, model.folder, max_prompt_tokens=MAX_TOKENS)
    (rows,) = rendered_rows(ready.rows, model.folder, MAX_TOKENS)
    ids = model.prompts.encode([row["prompt"] for row in rows])
    expected = [model.reference(case.prompt, is_prompt=True, case=case) for case in cases.values()]
    return dict(zip(cases, zip(ids, expected, strict=True), strict=True))


def conversations(model: Model) -> Found:
    """Conversations with an environment, turn by turn, with templates that leave earlier turns as they were."""
    return {
        name: (_turn_by_turn(model, case), _prompt_ids(model, case)) if _keeps_history(model, case) else None
        for name, case in model.cases.items()
    }


def _keeps_history(model: Model, case: Case) -> bool:
    """Return whether the template writes earlier turns as it wrote them when they were the last."""
    whole, prompt = _prompt_ids(model, case), case.prompt
    ends = [end for end, message in enumerate(prompt[:-1]) if _is_answer(message)]
    starts = [model.reference(prompt[:end], is_prompt=True, case=case) for end in ends]
    return "<think>" not in str(case.prompt) and all(whole[: len(start)] == start for start in starts)


def _is_answer(message: Mapping[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _prompt_ids(model: Model, case: Case) -> Ids:
    ids: Ids = model.reference(case.prompt, is_prompt=True, case=case)
    return ids


def _turn_by_turn(model: Model, case: Case) -> Ids:
    turns, prompt = _turns(case.prompt), _prompt_ids(model, case)
    transcript = Transcript(model.prompts, turns[0], case.tools)
    for observation in turns[1:]:
        transcript.respond(_sampled(model, prompt, len(transcript.token_ids)))
        transcript.observe(observation)
    return transcript.token_ids


def _turns(messages: Sequence[Any]) -> list[list[Any]]:
    """Split a prompt at the policy's turns; a prefill is part of the last observation."""
    turns: list[list[Any]] = [[]]
    for place, message in enumerate(messages):
        if _is_answer(message) and place < len(messages) - 1:
            turns.append([])
        else:
            turns[-1].append(message)
    return turns


def _sampled(model: Model, whole: Ids, start: int) -> Ids:
    """Return the tokens that a policy samples for the turn at `start`, with a token that ends a response."""
    tokenizer, ends = model.tokenizer, set(model.prompts.end_ids)
    written = ends | {tokenizer.convert_tokens_to_ids("<|end|>")} - {tokenizer.unk_token_id}
    end = next(place for place in range(start, len(whole)) if whole[place] in written)
    return [*whole[start:end], whole[end] if whole[end] in ends else tokenizer.eos_token_id]


def _keeps_prompt(model: Model, case: Case) -> bool:
    """Return whether the template writes the prompt of a finished conversation as it writes the prompt alone."""
    prompt: str = model.reference(case.prompt, is_prompt=True, case=case, tokenize=False)
    return model.whole(case).startswith(prompt)


def supervised(model: Model) -> Found:
    """Examples of supervised training."""
    cases = model.without_tools()
    rows = [{"prompt": case.prompt, "completion": [assistant(case.answer)]} for case in cases.values()]
    examples = read_completions(model.tokenizer, model.written(rows))
    return {
        name: _compared(model, case, example.token_ids) if _keeps_prompt(model, case) else None
        for (name, case), example in zip(cases.items(), examples, strict=True)
    }


def choices(model: Model) -> Found:
    """Chosen completions of direct preference optimisation."""
    cases = model.without_tools()
    rows = [
        {"prompt": case.prompt, "chosen": [assistant(case.answer)], "rejected": [assistant("No!")]}
        for case in cases.values()
    ]
    read = read_choices(model.tokenizer, model.written(rows))
    return {
        name: _compared(model, case, choice.chosen.token_ids) if _keeps_prompt(model, case) else None
        for (name, case), choice in zip(cases.items(), read, strict=True)
    }


def _compared(model: Model, case: Case, ids: Ids) -> tuple[Ids, Ids]:
    """Return our ids and those of the conversation, which end with an end of sequence if the template writes none."""
    messages = joined(case.prompt, [assistant(case.answer)])
    expected: Ids = model.reference(messages, is_prompt=False, case=case)
    added = model.tokenizer.added_tokens_decoder.items()
    end, ends = [model.tokenizer.eos_token_id], {token_id for token_id, token in added if token.special}
    if ids[: len(expected)] != expected:  # a template that writes the next header without being asked
        expected = expected[: max(place for place in range(len(ids)) if expected[place] in ends) + 1]
    return ids, expected + end if ids == expected + end and expected[-1] not in ends else expected


def pairs(model: Model) -> Found:
    """Chosen responses of preferences, as a reward model is trained on them."""
    cases = model.without_tools()
    rows = [
        {"prompt": case.prompt, "chosen": [assistant(case.answer)], "rejected": [assistant("No!")]}
        for case in cases.values()
    ]
    read = read_pairs(model.tokenizer, model.written(rows))
    return {
        name: (pair.chosen, _scored(model, case)) if _keeps_prompt(model, case) else None
        for (name, case), pair in zip(cases.items(), read, strict=True)
    }


def _scored(model: Model, case: Case) -> Ids:
    ids: Ids = model.tokenizer(model.whole(case), add_special_tokens=False)["input_ids"]
    return [*ids, model.tokenizer.eos_token_id]


def scoring(model: Model) -> Found:
    """Responses that a reward model scores over HTTP, decoded from the tokens that were sampled."""
    found: Found = {}
    for name, case in model.cases.items():
        if not _keeps_prompt(model, case):
            continue
        prompt, expected = _prompt_ids(model, case), _scored(model, case)
        (response,) = model.prompts.decode([expected[len(prompt) :]], [prompt])
        text = render(model.tokenizer, case.prompt, "row", is_prompt=True, tools=case.tools)
        body = HttpRewardClient("http://localhost", None, 1.0)._body([ScoreRequest("0", text, response)])
        (item,) = RewardsRequest.model_validate(parse_json(json.dumps(body).encode())).items()
        (ids,) = scored_token_ids(model.tokenizer, [item.prompt], [item.response])
        found[name] = ids, expected
    return found


def chat(model: Model) -> Found:
    """A person's lines and the policy's answers in `antiphon chat`."""
    return {name: _chat(model, case) for name, case in model.cases.items()}


def _chat(model: Model, case: Case) -> tuple[Ids, Ids] | None:
    turns = _turns(case.prompt)
    if case.tools or any(len(turn) != 1 for turn in turns) or not _keeps_history(model, case):
        return None
    prompt, asked = _prompt_ids(model, case), list[Ids]()

    class Policy:
        async def complete(self, requests: Sequence[SamplingRequest], *, with_options: bool) -> list[Ids]:
            asked.extend(request.token_ids for request in requests)
            return [_sampled(model, [*prompt, model.tokenizer.eos_token_id], len(asked[-1]))]

    config = RunConfig.model_validate({"rollout_actors": {"max_prompt_tokens": MAX_TOKENS}})
    conversation = ChatConversation(config, model.folder, tokenizer=model.prompts)
    for (message,) in turns:
        conversation.say(message["content"])
        asyncio.run(conversation.answer(Policy(), "seed"))
    return asked[-1], prompt


PATHS: dict[str, Callable[[Model], Found]] = {
    "prompts, evaluation": prompts,
    "conversations": conversations,
    "SFT": supervised,
    "DPO": choices,
    "preferences": pairs,
    "scoring over HTTP": scoring,
    "chat": chat,
}


def models(folder: Path, work: Path, cases: Mapping[str, Case]) -> list[Model]:
    """Return a model for each set of arguments of the template that the cases need."""
    found: list[Model] = []
    empty: Mapping[str, Any] = {}
    for kwargs in [empty, *(case.kwargs for case in cases.values() if case.kwargs)]:
        copy = folder
        if kwargs:
            copy = work / "model"
            copy.mkdir()
            for file in folder.iterdir():
                (copy / file.name).symlink_to(file)
            ChatSettings(chat_template_kwargs=kwargs).write(copy)
        own = {name: case for name, case in cases.items() if case.kwargs == kwargs}
        found.append(Model(copy, work, own, kwargs))
    return found
