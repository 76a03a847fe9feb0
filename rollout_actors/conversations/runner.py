"""Run conversations on a pool of environments."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from cluster.trajectory import PartialResponse
from rollout_actors.config import EnvironmentConfig
from rollout_actors.conversations.conversation import Conversation
from rollout_actors.conversations.dialogue import Keeping, Table
from rollout_actors.engine.thread import EngineThread
from rollout_actors.environments.pool import Environments
from rollout_actors.prompts import PromptTokenizer, scorer_columns


class Conversations:
    """Holds conversations over one engine; `row` is the prompt's data row, whose columns the environment is given."""

    def __init__(
        self, config: EnvironmentConfig, tokenizer: PromptTokenizer, engine: EngineThread, *, max_response_tokens: int
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._engine = engine
        self._max_response_tokens = max_response_tokens
        self._environments = Environments(config)

    async def hold(
        self,
        uid: str,
        row: Mapping[str, Any],
        *,
        seed: int,
        temperature: float,
        min_policy_version: int,
        max_segment_tokens: int | None = None,
        begun: PartialResponse | None = None,
        keep: Keeping | None = None,
    ) -> Conversation:
        """One conversation, every turn of it with weights of at least `min_policy_version`; what is `begun` of it is
        gone on with, and `keep` hears of its turns.

        Raises EnvironmentFault where the environment breaks its protocol.
        """
        sample = partial(
            self._engine.sample,
            uid,
            temperature=temperature,
            min_policy_version=min_policy_version,
            max_segment_tokens=max_segment_tokens,
        )
        async with self._environments.one() as host:
            table = Table(host, self._tokenizer, self._config, max_response_tokens=self._max_response_tokens)
            return await table.hold(uid, seed=seed, columns=scorer_columns(row), sample=sample, begun=begun, keep=keep)

    async def close(self) -> None:
        """Give the environments back."""
        await self._environments.close()
