"""Names of the advantage estimators and what each needs. Imports neither torch nor ray.

The functions are in `learner.ppo.advantages`. A function of the user's own is named by its dotted path; it declares its
needs with `@needs`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import InputError
from cluster.user_code import load

KEY = "learner.advantages"
DOTTED_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Needs:
    """What an estimator needs: a critic's values, several responses per prompt.

    `whitens`: whitened by default.
    """

    critic: bool = False
    groups: bool = False
    whitens: bool = False


ESTIMATORS = {
    "gae": Needs(critic=True, whitens=True),
    "grpo": Needs(groups=True),
    "dr_grpo": Needs(groups=True),
    "rloo": Needs(groups=True),
    "reinforce_pp": Needs(whitens=True),
    "reinforce_pp_baseline": Needs(groups=True, whitens=True),
}


def needs(*, critic: bool = False, groups: bool = False, whitens: bool = False) -> Callable[[Function], Function]:
    """Declare what an estimator of your own needs.

    Without this decorator it needs nothing and is not whitened.
    """

    def declare(function: Function) -> Function:
        function.needs = Needs(critic, groups, whitens)  # type: ignore[attr-defined]
        return function

    return declare


def needs_of(name: str) -> Needs:
    """Return the needs of a registered estimator, or of the function at a dotted path, which is imported.

    Raises InputError if there is no such function.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    declared = getattr(load(name, KEY), "needs", Needs())
    if not isinstance(declared, Needs):
        raise InputError(KEY, f"{name}.needs is not a Needs: declare it with @learner.estimators.needs(...)")
    return declared


def check_name(name: str) -> str:
    """Return the name of an estimator. Raises ValueError if it is neither registered nor a dotted path."""
    if name not in ESTIMATORS and not DOTTED_PATH.fullmatch(name):
        raise ValueError(
            f"{name!r} is neither one of {', '.join(ESTIMATORS)} nor a dotted path (package.module:function)"
        )
    return name
