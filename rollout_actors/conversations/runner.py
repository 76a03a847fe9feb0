"""Runs conversations with one engine and a pool of environments."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cluster.trajectory import PartialResponse
from rollout_actors.config import EnvironmentConfig
from rollout_actors.conversations.conversation import Conversation
from rollout_actors.conversations.dialogue import Dialogue, DialogueState
from rollout_actors.engine.response import ResponseRequest, SampledResponse, SamplingOptions
from rollout_actors.engine.thread import EngineThread
from rollout_actors.engine.vllm_parsers import HARMONY, VllmResponseParser
from rollout_actors.environments.pool import EnvironmentPool
from rollout_actors.parser_choice import DEFAULT_TOOL_PARSER, NONE, Parsers
from rollout_actors.prompts import PromptTokenizer, scorer_columns
from rollout_actors.tool_calls import ResponseParser


class Conversations:
    """Runs the conversations of one task, many at once."""

    def __init__(
        self,
        config: EnvironmentConfig,
        tokenizer: PromptTokenizer,
        engine: EngineThread,
        parsers: Parsers = Parsers(DEFAULT_TOOL_PARSER, NONE),
        *,
        max_response_tokens: int,
        options: SamplingOptions = SamplingOptions(),
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._engine = engine
        self._parsers = parsers
        self._making_parser = asyncio.Lock()
        self._parser: tuple[Sequence[Mapping[str, Any]], ResponseParser] | None = None
        self._max_response_tokens = max_response_tokens
        self._options = options
        self._environments = EnvironmentPool(config)

    async def run(
        self,
        uid: str,
        row: Mapping[str, Any],
        *,
        seed: int,
        temperature: float,
        min_policy_version: int,
        max_segment_tokens: int | None = None,
        begun: PartialResponse | None = None,
        on_progress: Callable[[DialogueState], None] | None = None,
    ) -> Conversation:
        """Run one conversation, sampled with weights of at least `min_policy_version`.

        Passes the columns of the data row `row` to the environment. Continues from `begun` if given; calls
        `on_progress` after each new turn. Raises EnvironmentFault if the environment breaks the protocol.
        """

        def sample(token_ids: Sequence[int], *, max_tokens: int, first_segment: int) -> Awaitable[SampledResponse]:
            request = ResponseRequest(
                uid,
                token_ids,
                max_tokens,
                temperature,
                min_policy_version,
                first_segment=first_segment,
                max_segment_tokens=max_segment_tokens,
                options=self._options,
            )
            return self._engine.sample(request)

        async with self._environments.acquire() as host:
            dialogue = Dialogue(
                host,
                self._tokenizer,
                self._config,
                max_response_tokens=self._max_response_tokens,
                parser_for=self._parser_for,
            )
            return await dialogue.run(
                uid, seed=seed, columns=scorer_columns(row), sample=sample, begun=begun, on_progress=on_progress
            )

    async def _parser_for(self, tools: Sequence[Mapping[str, Any]]) -> ResponseParser | None:
        """Return the parser of responses for these functions, or None without functions and channels.

        Made off the event loop: imports take seconds.
        """
        if not tools and self._parsers.tool != HARMONY:
            return None
        async with self._making_parser:
            if self._parser is None or self._parser[0] != tools:
                make = partial(
                    VllmResponseParser,
                    self._tokenizer.tokenizer,
                    *self._parsers,
                    schemas=tools,
                    end_ids=self._tokenizer.end_ids,
                )
                self._parser = tools, await asyncio.to_thread(make)
            return self._parser[1]

    async def close(self) -> None:
        """Close the environments."""
        await self._environments.close()
