"""The tokens and messages of a conversation as it grows.

Sampled tokens are kept and never tokenized again, so the learner sees exactly the tokens that were sampled. The
tokenizer's chat template formats messages; plain texts are used unchanged. Replaces lone surrogates by U+FFFD. Knows
neither environments nor engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.data.chat_template import ANSWER, Message, RenderedPrompt, render, require_template
from cluster.data.unicode_text import as_unicode
from cluster.errors import InputError
from rollout_actors.environments.protocol import Observation
from rollout_actors.prompts import PromptTokenizer

KEY = "environment"


class Transcript:
    """Tokens and messages of one conversation."""

    def __init__(self, tokenizer: PromptTokenizer, start: Observation, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """Raises InputError if there are messages but no chat template, or if the prompt is too long."""
        self._tokenizer = tokenizer
        self._tools = as_unicode(list(tools))
        start = as_unicode(start)
        self._has_messages = not isinstance(start, str)
        self.messages: list[Message] = [{"role": "user", "content": start}] if isinstance(start, str) else list(start)
        self.prompt = start if isinstance(start, str) else self._prompt(start)
        (self.token_ids,) = tokenizer.encode([self.prompt])

    def _prompt(self, start: Sequence[Message]) -> RenderedPrompt:
        require_template(self._tokenizer.tokenizer, KEY)
        return render(self._tokenizer.tokenizer, start, KEY, is_prompt=True, tools=self._tools)

    def respond(self, token_ids: Sequence[int]) -> str:
        """Append a response of the policy and return its text."""
        (text,) = self._tokenizer.decode([token_ids])
        self.token_ids += token_ids
        self.messages.append({"role": "assistant", "content": text})
        return text

    def observe(self, observation: Observation) -> None:
        """Append the environment's answer, up to the start of the policy's next turn."""
        observation = as_unicode(observation)
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)
        self.messages += messages
        if not self._has_messages and isinstance(observation, str):
            self.token_ids += self._tokenizer.encode_part(observation)
        else:
            self.token_ids += self._tokenizer.encode_part(self._after_response(messages))

    def _after_response(self, messages: Sequence[Message]) -> RenderedPrompt:
        """Return what the template writes after a response, without the end token that was sampled.

        Rendered with a known answer in place of the real one: a template may render earlier turns differently once the
        conversation continues, such as without their reasoning.
        """
        tokenizer = self._tokenizer.tokenizer
        require_template(tokenizer, KEY)
        answer = ANSWER
        while answer in str((messages, self._tools)):
            answer += "-"
        known = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        text = render(tokenizer, [*known, *messages], KEY, is_prompt=True, tools=self._tools)
        start = text.rfind(answer)
        if start < 0:
            raise InputError(KEY, "the chat template leaves out the policy's answer: it does not support several turns")
        after = text.part(start + len(answer))
        end = self._tokenizer.special_text(self.token_ids[-1])
        return after.part(len(end)) if end and after.startswith(end) else after
