"""Compare two run files setting by setting, and decide by each field's `may_change` what is allowed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.config import MayChange, Section, mark_of
from deploy.config.schema import RunConfig


class Change(NamedTuple):
    """A setting with another value; `key` is its place in the run file.

    `reevaluates`: evaluation depends on it, so earlier evaluations become invalid.
    """

    key: str
    before: Any
    now: Any
    may_change: MayChange
    reevaluates: bool

    def __str__(self) -> str:
        return f"{self.key} (was {_shown(self.before)}, now {_shown(self.now)})"


def changes(before: RunConfig, now: RunConfig, *, free: Collection[str] = ()) -> list[Change]:
    """Return every setting that differs, in the order of the run file; sections in `free` may always change.

    A setting that may only rise is `always` if it rises, else `never`. The `adversarial` settings of a task that trains
    on altered prompts may never change.
    """
    tasks = now.by_task().items()
    altered = tuple(
        f"tasks.{name}.adversarial." if name else "adversarial." for name, task in tasks if task.adversarial_share
    )
    found = []
    for change in _of_section("", before, now):
        may_change = change.may_change
        if may_change == "higher":
            may_change = "always" if change.now > change.before else "never"
        if altered and change.key.startswith(altered):
            may_change = "never"
        if change.key.partition(".")[0] in free:
            may_change = "always"
        found.append(change._replace(may_change=may_change))
    return found


def _of_section(prefix: str, before: Section, now: Section, *, reevaluates: bool = False) -> Iterator[Change]:
    for name, field in type(now).model_fields.items():
        mark = mark_of(field)
        mark = mark | {"reevaluates": reevaluates or mark.get("reevaluates", False)}
        yield from _of_value(f"{prefix}{name}", getattr(before, name), getattr(now, name), mark)


def _of_value(key: str, before: Any, now: Any, mark: Mapping[str, Any]) -> Iterator[Change]:
    if before == now:
        return
    if isinstance(now, Section) and type(before) is type(now):
        yield from _of_section(f"{key}.", before, now, reevaluates=mark["reevaluates"])
    elif isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = mark.get("keys", {})
        for name in {**before, **now}:
            own = {**mark, "may_change": keys.get(name, mark["may_change"])}
            yield from _of_value(f"{key}.{name}", before.get(name), now.get(name), own)
    else:
        yield Change(key, before, now, mark["may_change"], mark["reevaluates"])


def refused(changed: Sequence[Change], *, allow_recorded: bool) -> str | None:
    """Return why a run refuses these changes, and what to do; None if it accepts them."""
    kinds = {kind: [str(change) for change in changed if change.may_change == kind] for kind in _WORDS}
    if not kinds["never"] and (allow_recorded or not kinds["recorded"]):
        return None
    parts = [f"{', '.join(keys)} {_WORDS[kind]}" for kind, keys in kinds.items() if keys]
    other = "give the run another --name"
    if kinds["never"]:
        advice = f"{other}, or undo what may not change"
    else:
        advice = f"add --allow-changes, which records them from the next step on, or {other}"
    return (
        f"settings have changed: {'; '.join(parts)}. To continue: {advice} (--fresh deletes this run and starts over)"
    )


_WORDS = {
    "never": "may not change within a run",
    "recorded": "may change with --allow-changes",
    "always": "may change at any time",
}


def _shown(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_defaults=True)
    return "unset" if value is None else json.dumps(value, default=str)
