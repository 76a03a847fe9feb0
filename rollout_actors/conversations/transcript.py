"""A conversation as tokens: what the policy sampled stays as it was sampled, what others say is put between.

Nothing is ever tokenized again, so that the learner sees the very tokens that were sampled. Messages are written by the
tokenizer's chat template, texts as they are. Knows neither environments nor engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.data.chat_template import Message, RenderedPrompt, render, require_template
from cluster.errors import InputError
from rollout_actors.environments.protocol import Observation
from rollout_actors.prompts import PromptTokenizer

WHERE = "environment"
ANSWER = "antiphon-answer-41f0"
"""Stands for the policy's response where the template is asked what it writes behind one."""


class Transcript:
    """The tokens and the messages of one conversation."""

    def __init__(self, tokenizer: PromptTokenizer, start: Observation, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """Raises InputError where messages meet a tokenizer without a chat template, or the prompt is too long."""
        self._tokenizer = tokenizer
        self._tools = list(tools)
        self._has_messages = not isinstance(start, str)
        self.messages: list[Message] = [{"role": "user", "content": start}] if isinstance(start, str) else list(start)
        self.prompt = start if isinstance(start, str) else self._prompt(start)
        (self.token_ids,) = tokenizer.encode([self.prompt])

    def _prompt(self, start: Sequence[Message]) -> RenderedPrompt:
        require_template(self._tokenizer.tokenizer, WHERE)
        return render(self._tokenizer.tokenizer, start, WHERE, is_prompt=True, tools=self._tools)

    def respond(self, token_ids: Sequence[int]) -> str:
        """Take a response of the policy; its text."""
        (text,) = self._tokenizer.decode([token_ids])
        self.token_ids += token_ids
        self.messages.append({"role": "assistant", "content": text})
        return text

    def observe(self, observation: Observation) -> None:
        """Take what the environment answered, up to where the policy's next turn begins."""
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)
        self.messages += messages
        if not self._has_messages and isinstance(observation, str):
            self.token_ids += self._tokenizer.encode_part(observation)
        else:
            self.token_ids += self._tokenizer.encode_part(self._behind_the_answer(messages))

    def _behind_the_answer(self, messages: Sequence[Message]) -> str:
        """What the template writes behind a response, less the end that the policy sampled itself.

        Told from a conversation whose answer is known, since a template may write the whole one otherwise once it has
        gone on (such as without the thoughts in it).
        """
        tokenizer = self._tokenizer.tokenizer
        require_template(tokenizer, WHERE)
        known = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
        text = render(tokenizer, [*known, *messages], WHERE, is_prompt=True, tools=self._tools)
        _, found, behind = text.rpartition(ANSWER)
        if not found:
            raise InputError(WHERE, "the chat template leaves out what the policy answered: no second turn follows it")
        end = self._tokenizer.special_text(self.token_ids[-1])
        return behind.removeprefix(end) if end else behind
