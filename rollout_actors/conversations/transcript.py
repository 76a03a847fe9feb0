"""The tokens and messages of a conversation as it grows.

Sampled tokens are kept and never tokenized again, so the learner sees exactly the tokens that were sampled. Only an end
token that the template would not write behind an answer is replaced by the template's. If the history is rendered anew,
each turn starts a new sequence, which repeats all messages as the template writes them now. The tokenizer's chat
template formats messages; plain texts are used unchanged. Replaces lone surrogates by U+FFFD.
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
from rollout_actors.conversations.history import as_users, assistant_message, differ_by_date, structured
from rollout_actors.environments.protocol import Observation
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.tool_calls import ResponseParser, ToolCall

KEY = "environment"


class Transcript:
    """Tokens and messages of one conversation."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        start: Observation,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        parser: ResponseParser | None = None,
        renders_anew: bool = False,
    ) -> None:
        """Raises InputError if there are messages but no chat template, or if the prompt is too long."""
        self._tokenizer = tokenizer
        self._tools = as_unicode(list(tools))
        self._parser = parser
        start = as_unicode(start)
        if isinstance(start, str) and settings_of(tokenizer.tokenizer).as_messages:
            start = as_conversation(start)
        self._has_messages = not isinstance(start, str)
        self._renders_anew = renders_anew and self._has_messages
        self.messages: list[Message] = [{"role": "user", "content": start}] if isinstance(start, str) else list(start)
        self._history = list(self.messages)
        """The messages with responses as the template takes them."""
        self.prompt = start if isinstance(start, str) else self._prompt(start)
        self._num_sampled = 0
        self._has_end = False
        """Whether the template writes the token that the response ended with behind an answer."""
        self.calls: Sequence[ToolCall] | None = None
        """The calls in the last response; None if nothing read them."""
        self.sequence_starts: list[int] = []
        (self.token_ids,) = tokenizer.encode([self.prompt])

    @property
    def sequence(self) -> list[int]:
        """The tokens that the next token is sampled after."""
        return self.token_ids[self.sequence_starts[-1] if self.sequence_starts else 0 :]

    def _prompt(self, messages: Sequence[Message]) -> RenderedPrompt:
        require_template(self._tokenizer.tokenizer, KEY)
        return render(self._tokenizer.tokenizer, messages, KEY, is_prompt=True, tools=self._tools)

    def respond(self, token_ids: Sequence[int]) -> str:
        """Append a response of the policy and return its text."""
        (text,) = self._tokenizer.decode([token_ids], [self.sequence])
        parsed = self._parser.read(self.sequence, token_ids) if self._parser is not None else None
        self.calls = None if parsed is None else parsed.calls
        self.token_ids += token_ids
        self._num_sampled = len(token_ids)
        self.messages = joined(self.messages, [{"role": "assistant", "content": text}])
        self._history = joined(self._history, [assistant_message(text, parsed)])
        return text

    def take_kept(self, kept: Sequence[int], *, instead_of: Sequence[int]) -> bool:
        """Replace the last tokens by those of a kept conversation, if they differ by the template's date only."""
        if not differ_by_date(self._tokenizer.tokenizer, instead_of, kept):
            return False
        self.token_ids[len(self.token_ids) - len(instead_of) :] = kept
        return True

    def observe(self, observation: Observation) -> int | None:
        """Append the environment's answer, up to the start of the policy's next turn.

        If the template ends an answer with another token than the response ended with, the template's replaces it:
        returns the token that was taken off the response, or None.
        """
        observation = as_unicode(observation)
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)
        self.messages += messages
        self._history += messages
        if not self._has_messages and isinstance(observation, str):
            self.token_ids += self._tokenizer.encode_part(observation)
            return None
        if self._renders_anew:
            self.sequence_starts.append(len(self.token_ids))
            self.token_ids += self._tokenizer.encode_part(self._rendered_history())
            return None
        after = self._after_response(messages)
        is_replaced = self._is_end_replaced(after)
        replaced = self.token_ids.pop() if is_replaced else None
        self.token_ids += self._tokenizer.encode_part(after)
        return replaced

    def _rendered_history(self) -> RenderedPrompt:
        """Return all messages as a prompt.

        If the template refuses the policy's calls, or results of functions that no message calls since a call cannot be
        read, responses are texts and results are messages of the user.
        """
        try:
            return self._prompt(self._history)
        except InputError:
            if all(message["role"] != "tool" for message in self._history):
                raise
            return self._prompt(as_users(self.messages))

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
        require_template(self._tokenizer.tokenizer, KEY)
        answer = ANSWER
        while answer in str((messages, self._tools)):
            answer += "-"
        after = self._after_call(answer, messages) if messages[0]["role"] == "tool" else None
        if after is None:
            after = self._after_text(answer, messages)
        end = self._tokenizer.special_text(self.token_ids[-1])
        num_spaces = len(after) - len(after.lstrip())
        self._has_end = bool(end) and after.startswith(end, num_spaces)
        return after.part(num_spaces + len(end)) if self._has_end else after

    def _after_text(self, answer: str, messages: Sequence[Message]) -> RenderedPrompt:
        known = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        text = self._prompt([*known, *messages])
        start = text.rfind(answer)
        if start < 0:
            raise InputError(KEY, "the chat template leaves out the policy's answer: it does not support several turns")
        return text.part(start + len(answer))

    def _after_call(self, answer: str, messages: Sequence[Message]) -> RenderedPrompt | None:
        """Return what the template writes after a call, from its end token on; None if it does not write calls."""
        calls = [ToolCall(str(each.get("name") or "f"), {"x": answer}) for each in messages if each["role"] == "tool"]
        calling = {"role": "assistant", "content": "", "tool_calls": structured(calls)}
        try:
            text = self._prompt([{"role": "user", "content": "?"}, calling, *messages])
        except InputError:
            return None
        start = text.rfind(answer)
        ends = {self._tokenizer.special_text(token) for token in (*self._tokenizer.end_ids, self.token_ids[-1])}
        places = [place for end in filter(None, ends) if (place := text.find(end, start)) >= 0]
        return text.part(min(places)) if start >= 0 and places else None
