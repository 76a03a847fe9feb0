"""Select the data columns that a user's function takes by name, besides texts by position."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import InputError
from reward_service.functions.signatures import column_parameters


def columns_for(
    function: Callable[..., Any], rows: Sequence[Mapping[str, Any]], key: str, *, num_texts: int
) -> dict[str, list[Any]]:
    """Return the columns that the function names, or all if it takes `**columns`; a value per row, its own copy.

    The function's first `num_texts` parameters take texts. Raises InputError at the run file's `key` if a column that
    the function requires is missing.
    """
    parameters = column_parameters(function, num_texts=num_texts)
    available = [name for name in rows[0] if name != "prompt" and name not in parameters.texts]
    for name, is_required in parameters.named.items():
        if is_required and name not in available:
            message = f"needs a column {name!r}; the data has {', '.join(available) or 'no columns'} besides the prompt"
            raise InputError(key, message)
    return {name: [copy.deepcopy(row.get(name)) for row in rows] for name in available if parameters.takes(name)}
