"""Turn pydantic's validation error of a run file into one InputError that names the key."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from cluster.errors import InputError
from deploy.config.suggestions import suggest


def input_error(error: ValidationError, root: type[BaseModel]) -> InputError:
    """Return the first error as an InputError; unknown keys come first, because they explain other errors.

    The ValueError of a whole section names its key in its message, as `key: what`.
    """
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    location = [str(part) for part in detail["loc"]]
    section, keys = _section_of(location[:-1], root)
    if detail["type"] == "extra_forbidden":
        key = ".".join([*keys, location[-1]])
        return InputError(key, f"unknown key{suggest(key, section.model_fields if section else ())}")
    where = ".".join(_section_of(location, root)[1])
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    message = message.replace("should be an object", "should be a table")
    if detail["type"] == "value_error":
        named = re.fullmatch(r"(\w[\w.-]*): (.*)", message, re.DOTALL)
        return InputError(f"{where}.{named[1]}", named[2]) if named else InputError(where, message)
    if detail["type"] == "union_tag_invalid":
        return InputError(f"{where}.kind", f"{detail['ctx']['tag']!r} is none of {detail['ctx']['expected_tags']}")
    if detail["type"] == "union_tag_not_found":
        return InputError(f"{where}.kind", "missing")
    return InputError(where, f"{message}, got {json.dumps(detail['input'], default=str)}")


def _section_of(location: Sequence[str], root: type[BaseModel]) -> tuple[type[BaseModel] | None, list[str]]:
    """Return the section at a location, or None, and its keys.

    For a union of sections, pydantic's location also contains the chosen section, which is not a key.
    """
    found: Any = root
    keys = []
    for part in location:
        tagged = {} if isinstance(found, type) or _is_table(found) else _by_tag(found)
        if part in tagged:
            found = tagged[part]
            continue
        keys.append(part)
        if isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(part)
            found = field.annotation if field else None
        else:
            found = get_args(found)[1] if _is_table(found) else None
    return (found if isinstance(found, type) and issubclass(found, BaseModel) else None), keys


def _is_table(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _by_tag(annotation: Any) -> dict[str, Any]:
    """Return the sections of a union by pydantic's name for them: the value of `kind`, or the class name."""
    found: dict[str, Any] = {}
    for choice in get_args(annotation):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            kind = choice.model_fields.get("kind")
            found[get_args(kind.annotation)[0] if kind else choice.__name__] = choice
        else:
            found |= _by_tag(choice)
    return found
