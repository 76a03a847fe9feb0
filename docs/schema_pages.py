"""Pages made of JSON schemas: the sections of the run file, and the routes of HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
MAY_CHANGE = {
    "always": "may change at any time",
    "recorded": "may change with `--allow-changes`",
    "higher": "may only rise",
    "never": "may not change within a run",
}
TYPES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "object": "table"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n" for line in lines
    )


def run_file_page() -> str:
    """Every section of the run file, from its JSON schema."""
    from deploy.config.schema import RunConfig

    schema = RunConfig.model_json_schema()
    text = [
        "# Run file\n\nA run file is TOML. A section or a key that is left out has its default; an unknown key is an"
        " error. `--set 'SECTION.KEY = VALUE'` on the command line is one more line of the file, and `antiphon train"
        " RUN.toml --dry-run` prints the file with every default filled in. `antiphon config SECTION.KEY` prints one"
        " setting of this page, and `antiphon config --json-schema` the JSON schema, for editors.\n\nEach setting says"
        " whether it may change when a run resumes; see [Change settings](../guides/resume.md#change-settings).\n"
    ]
    for name, field in schema["properties"].items():
        text += _sections(f"{name}", field, schema["$defs"], level=2)
    return "\n".join(text)


def _sections(name: str, field: Mapping[str, Any], defs: Mapping[str, Any], *, level: int) -> Iterator[str]:
    """A section under its heading, then the sections inside it."""
    for title, section, kind in _of(name, field, defs):
        anchor = f"{title}.{kind}" if kind else title
        label = f'[{title}]` with `kind = "{kind}"' if kind else f"[{title}]"
        toc = f" data-toc-label='kind = \"{kind}\"'" if kind else ""
        yield f"{'#' * level} `{label}` {{ #{anchor}{toc} }}\n\n{section.get('description', '').strip()}\n"
        inner = {key: f for key, f in section.get("properties", {}).items() if list(_of(key, f, defs))}
        for key, value in section.get("properties", {}).items():
            if key not in inner and key != "kind":
                yield _setting(f"{anchor}.{key}", key, value, defs, is_required=key in section.get("required", ()))
        for key, value in inner.items():
            yield from _sections(f"{title}.{key}", value, defs, level=level + 1)


def _of(name: str, field: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """The sections that a field holds: itself, each entry of a table by NAME, or each of several kinds."""
    entries = field.get("additionalProperties")
    if "$ref" in field and "properties" in (section := _resolved(field, defs)):
        yield name, section, ""
    elif isinstance(entries, Mapping) and "$ref" in entries:
        yield f"{name}.NAME", _resolved(entries, defs), ""
    elif isinstance(entries, Mapping) and "discriminator" in entries:
        for kind, reference in entries["discriminator"]["mapping"].items():
            yield f"{name}.NAME", _resolved({"$ref": reference}, defs), kind


def _resolved(field: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", defs[field["$ref"].rpartition("/")[2]]) if "$ref" in field else field


def _setting(anchor: str, key: str, field: Mapping[str, Any], defs: Mapping[str, Any], *, is_required: bool) -> str:
    default = "required" if is_required else f"default {_value(field.get('default', {}))}"
    kind = f"{_type(field, defs)}; {default}; {_may_change(field)}"
    return (
        f'<div class="setting" markdown>\n\n#### `{key}` {{ #{anchor} }}\n\n{kind}\n{{ .type }}\n\n'
        f"{field.get('description', '')}\n\n</div>\n"
    )


def _may_change(field: Mapping[str, Any]) -> str:
    """Whether a setting may change when a run resumes, and keys of a table for which another rule holds."""
    text = MAY_CHANGE[field.get("may_change", "never")]
    others: dict[str, list[str]] = {}
    for key, rule in field.get("keys", {}).items():
        others.setdefault(MAY_CHANGE[rule], []).append(f"`{key}`")
    return "; ".join([text, *(f"{', '.join(keys)} {rule}" for rule, keys in others.items())])


def _value(value: Any) -> str:
    """A default as it stands in TOML."""
    if value is None:
        return "unset"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(field: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """The type of a field in words, with its bounds."""
    field = _resolved(field, defs)
    if "anyOf" in field:
        kinds = [_type(choice, defs) for choice in field["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field or "const" in field:
        return "one of " + ", ".join(f'`"{value}"`' for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        items = _type(field.get("items", {}), defs).removeprefix("one of ")
        return f"list of {_plural(items)}{_number_of(field)}"
    if field.get("type") == "object" and isinstance(field.get("additionalProperties"), Mapping):
        return f"table of {_plural(_type(field['additionalProperties'], defs))}"
    if field.get("format") == "path":
        return "path"
    words = [TYPES.get(str(field.get("type")), "any value")]
    words += [f"{word} {field[bound]:,}" for bound, word in BOUNDS.items() if bound in field]
    return ", ".join(words)


def _plural(kind: str) -> str:
    return {"text": "texts", "path": "paths", "number": "numbers", "integer": "integers"}.get(kind, kind)


def _number_of(field: Mapping[str, Any]) -> str:
    return f", {field['minItems']} or more" if field.get("minItems") else ""


def openapi() -> dict[str, Any]:
    """The OpenAPI document of the reward service with the routes of feedback, as /openapi.json gives it."""
    import httpx

    from reward_service.config.service import HttpConfig
    from reward_service.feedback.routes import feedback_router
    from reward_service.feedback.selection import FeedbackSettings
    from reward_service.http.routes import build_app
    from reward_service.http.tokens import TokenBook

    unused = cast(Any, None)
    routers = [feedback_router(unused, settings=FeedbackSettings(seed=0))]
    app = build_app(unused, tokens=TokenBook(None), limits=HttpConfig(), timeout_s=1.0, routers=routers)

    async def get() -> dict[str, Any]:
        transport = httpx.ASGITransport(app=cast(Any, app), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = await client.get("/openapi.json")
            return cast("dict[str, Any]", answer.raise_for_status().json())

    return asyncio.run(get())


def http_page(document: Mapping[str, Any]) -> str:
    """Every route with what is sent and returned, from the OpenAPI document."""
    from reward_service.http.errors import CODES, MEANINGS

    text = [
        "# HTTP\n\nThe reward service and the labelling page answer these routes; a service says which at"
        " `/openapi.json`, and [openapi.json](openapi.json) is the whole contract. Bodies are JSON in UTF-8. A token is"
        " taken as a bearer or as the password of HTTP Basic, on every route but `/healthz`; it is required beyond"
        " loopback.\n"
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            text += _route(f"{method.upper()} {path}", route, document["components"]["schemas"])
    rows = [[str(status), f"`{CODES[status]}`", meaning] for status, meaning in MEANINGS.items()]
    errors = table(["status", "code", "meaning"], rows)
    text.append(f'## Errors\n\nEvery error is `{{"error": {{"code", "message", "field"}}}}`.\n\n{errors}')
    return "\n".join(text)


def _route(name: str, route: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"## `{name}`\n\n{route.get('description', '')}\n"
    parameters = route.get("parameters", [])
    if parameters:
        rows = [[f"`{p['name']}`", f"in the {p['in']}", "required" if p.get("required") else ""] for p in parameters]
        yield table(["parameter", "where", ""], rows)
    for title, body in (("Body", route.get("requestBody")), ("Answer", route["responses"].get("200"))):
        schema = ((body or {}).get("content", {}).get("application/json", {}) or {}).get("schema")
        for label, fields in _bodies(title, schema or {}, schemas):
            yield f"**{label}**\n\n{fields}"


def _bodies(title: str, schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields of a body, or of each form that it may have."""
    for form in schema.get("oneOf", schema.get("anyOf", [schema])):
        section = _resolved(form, schemas)
        if "properties" not in section:
            continue
        required = section.get("required", ())
        rows = [
            [f"`{key}`", f"{_json_type(field)}{', required' * (key in required)}", field.get("description", "")]
            for key, field in section["properties"].items()
        ]
        yield f"{title}: {section.get('title', '')}".rstrip(": "), table(["field", "type", "meaning"], rows)


def _json_type(field: Mapping[str, Any]) -> str:
    """The JSON type of a field in words."""
    if "$ref" in field:
        return f"`{field['$ref'].rpartition('/')[2]}`"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_json_type(choice) for choice in field["anyOf"]))
    if "const" in field or "enum" in field:
        return ", ".join(f'`"{value}"`' for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_json_type(field.get('items', {}))}"
    return str(field.get("type", "any"))
