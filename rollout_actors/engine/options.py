"""Makes the sampling options of an actor from its settings and its tokenizer."""

from __future__ import annotations

import copy
from typing import Any

from rollout_actors.config import RolloutActorsConfig
from rollout_actors.engine.protocol import Truncation
from rollout_actors.engine.response import SamplingOptions
from rollout_actors.engine.stop_texts import StopTexts


def sampling_options(config: RolloutActorsConfig, tokenizer: Any) -> SamplingOptions:
    """Return which tokens may be sampled and which texts end a response.

    Stop texts are found with a copy of the tokenizer: a fast one may not be used in two threads at once.
    """
    truncation = Truncation(config.top_p, config.top_k, config.min_p)
    if not config.stop:
        return SamplingOptions(truncation)
    own = copy.deepcopy(tokenizer)

    def decode(token_ids: list[int]) -> str:
        return str(own.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return SamplingOptions(truncation, StopTexts(config.stop, decode))
