"""`antiphon config`: the reference of the run file, made of the fields of its sections."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import Section, mark_of
from cluster.errors import InputError
from deploy.config.schema import RunConfig

MAY_CHANGE = {
    "always": "may change at any time",
    "recorded": "may change with --allow-changes",
    "higher": "may only rise",
    "never": "may not change within a run",
}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def config(
    key: Annotated[str, typer.Argument(metavar="[SECTION[.KEY]]", help="Only this section or key.")] = "",
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON schema, for editors.")] = False,
) -> None:
    """Print the settings of the run file: type, default, range, meaning, and whether they may change within a run.

    [dim]antiphon config learner.clip[/dim]
    """
    if json_schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    found = [line for name, lines in _entries(RunConfig, "") if _is_under(name, key) for line in lines]
    if not found:
        from deploy.config.suggestions import suggest

        raise InputError(key, f"not a section or key of the run file{suggest(key)}")
    print("\n".join(found).strip())


def _is_under(name: str, key: str) -> bool:
    return not key or name == key or name.startswith((f"{key}.", f"{key} "))


def _entries(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each section and each of its keys with the lines that describe it."""
    if prefix:
        yield prefix, ["", f"[{prefix}]", *_indented(inspect.getdoc(section) or "", 2)]
    inner = []
    for name, field in section.model_fields.items():
        sections = list(_sections(field.annotation))
        key = f"{prefix}.{name}" if prefix else name
        if field.annotation in sections:
            inner.append((key, sections))
            continue
        if prefix:
            yield key, ["", f"  {key}", *_described(field)]
        if sections:
            inner.append((f"{key}.NAME", sections))
    for key, sections in inner:
        for other in sections:
            kind = other.model_fields.get("kind")
            yield from _entries(other, f"{key} (kind = {get_args(kind.annotation)[0]})" if kind else key)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _described(field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else f"default {_shown(field.default)}"
    limits = [
        f"{sign} {getattr(m, name):g}" for m in field.metadata for name, sign in BOUNDS.items() if hasattr(m, name)
    ]
    facts = [_type(field.annotation), *limits, default, MAY_CHANGE[mark_of(field)["may_change"]]]
    return [f"    {'; '.join(facts)}", *_indented(field.description or "", 4)]


def _type(annotation: Any) -> str:
    """The type in words: the values of a Literal, or Python's name."""
    choices = [_type(part) for part in get_args(annotation) if part is not type(None)]
    origin = getattr(annotation, "__origin__", None)
    if str(annotation).startswith("typing.Literal"):
        return " | ".join(json.dumps(value) for value in get_args(annotation))
    if str(annotation).startswith("typing.Annotated"):
        return choices[0]
    if origin is tuple:
        return f"list of {choices[0]}"
    if origin is dict:
        return "table"
    return " or ".join(choices) or {"str": "text", "bool": "true or false", "int": "integer", "float": "number"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", "any value").lower()
    )


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, default=str, ensure_ascii=False)


def _indented(text: str, width: int) -> list[str]:
    return [f"{' ' * width}{line}".rstrip() for line in text.strip().splitlines()]
