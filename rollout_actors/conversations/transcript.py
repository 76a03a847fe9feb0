"""The tokens and messages of a conversation as it grows.

Sampled tokens are kept and never tokenized again, so the learner sees exactly the tokens that were sampled. Only an end
token that the template would not write behind an answer is replaced by the template's. The tokenizer's chat template
formats messages; plain texts are used unchanged. Replaces lone surrogates by U+FFFD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.data.as_messages import as_conversation
from cluster.data.chat_settings import settings_of
from cluster.data.chat_template import (
    ANSWER,
    Message,
    RenderedPrompt,
    joined,
    render,
    require_template,
    special_tokens,
)
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
        if isinstance(start, str) and settings_of(tokenizer.tokenizer).as_messages:
            start = as_conversation(start)
        self._has_messages = not isinstance(start, str)
        self.messages: list[Message] = [{"role": "user", "content": start}] if isinstance(start, str) else list(start)
        self.prompt = start if isinstance(start, str) else self._prompt(start)
        self._num_sampled = 0
        self._has_end = False
        """Whether the template writes the token that the response ended with behind an answer."""
        (self.token_ids,) = tokenizer.encode([self.prompt])

    def _prompt(self, start: Sequence[Message]) -> RenderedPrompt:
        require_template(self._tokenizer.tokenizer, KEY)
        return render(self._tokenizer.tokenizer, start, KEY, is_prompt=True, tools=self._tools)

    def respond(self, token_ids: Sequence[int]) -> str:
        """Append a response of the policy and return its text."""
        (text,) = self._tokenizer.decode([token_ids], [self.token_ids])
        self.token_ids += token_ids
        self._num_sampled = len(token_ids)
        self.messages = joined(self.messages, [{"role": "assistant", "content": text}])
        return text

    def observe(self, observation: Observation) -> int | None:
        """Append the environment's answer, up to the start of the policy's next turn.

        If the template ends an answer with another token than the response ended with, the template's replaces it:
        returns the token that was taken off the response, or None.
        """
        observation = as_unicode(observation)
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)
        self.messages += messages
        if not self._has_messages and isinstance(observation, str):
            self.token_ids += self._tokenizer.encode_part(observation)
            return None
        after = self._after_response(messages)
        is_replaced = self._is_end_replaced(after)
        replaced = self.token_ids.pop() if is_replaced else None
        self.token_ids += self._tokenizer.encode_part(after)
        return replaced

    def _is_end_replaced(self, after: RenderedPrompt) -> bool:
        """Return whether the response ends with an end token in whose place the template writes a special token."""
        pattern = special_tokens(self._tokenizer.tokenizer)
        is_ended = self._num_sampled > 1 and self.token_ids[-1] in self._tokenizer.end_ids
        return is_ended and not self._has_end and pattern is not None and pattern.match(after.lstrip()) is not None

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
        num_spaces = len(after) - len(after.lstrip())
        self._has_end = bool(end) and after.startswith(end, num_spaces)
        return after.part(num_spaces + len(end)) if self._has_end else after
