"""Ends a response at a stop text, which the engine need not know.

The tokens stay as they were sampled, those of the stop text included, so that their log-probabilities are exact; only
the text of the response is cut. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MARGIN_TOKENS = 4
"""Tokens that are decoded before the longest possible stop text: the first ones may be parts of a character."""


class StopTexts:
    """The texts that end a response.

    `decode` returns the text of token ids with their special tokens; it is called in the engine's thread.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._texts = tuple(texts)
        self._decode = decode
        self._num_decoded = max(len(text.encode()) for text in texts) + MARGIN_TOKENS

    def end(self, token_ids: Sequence[int], num_new: int) -> int | None:
        """Return the number of tokens up to the end of the first stop text, or None if there is none.

        Looks for stop texts that end within the last `num_new` tokens: earlier ones have ended the response.
        """
        for end in range(len(token_ids) - num_new + 1, len(token_ids) + 1):
            text = self._decode(list(token_ids[max(0, end - self._num_decoded) : end]))
            if any(stop in text for stop in self._texts):
                return end
        return None
