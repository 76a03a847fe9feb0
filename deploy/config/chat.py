"""Check and read the settings with which a run writes conversations. Imports neither torch nor transformers."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from cluster.data.chat_settings import ChatSettings
from cluster.data.control_tokens import Spellings, is_control
from cluster.errors import InputError
from cluster.files import read_json
from cluster.hub.download import local_model
from deploy.config.schema import RunConfig, is_template

TEMPLATE_FILE = "chat_template.jinja"


def has_chat_settings(config: RunConfig) -> bool:
    """Return whether the run file changes how conversations are written, or the template writes today's date.

    The run keeps both beside its own copy of the model.
    """
    is_changed = config.model.chat_template is not None or config.data.chat_settings() != ChatSettings()
    return is_changed or writes_date(template_of(config))


def writes_date(template: str | None) -> bool:
    """Return whether a chat template writes today's date."""
    return template is not None and "strftime_now" in template


def chat_template(config: RunConfig) -> str | None:
    """Return the text of `model.chat_template`, or None. Raises InputError if it names no file and is no template."""
    value = config.model.chat_template
    if value is None or is_template(value):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{value!r} is neither a template (it has no {{{{ or {{%) nor a file that can be read: {error}"
        raise InputError("model.chat_template", what) from error


def template_of(config: RunConfig) -> str | None:
    """Return the text of the chat template that the run uses; None if it has none, or if a builder makes the model.

    Of several named templates, the default one.
    """
    own = chat_template(config)
    if own is not None or config.model.path is None:
        return own
    return folder_template(local_model(config.model.path, weights=False))


def folder_template(folder: Path) -> str | None:
    """Return the chat template of a model folder, or None."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    found = read_json(settings).get("chat_template") if settings.exists() else None
    named = {each["name"]: each["template"] for each in found} if isinstance(found, list) else {"default": found}
    template = named.get("default") or next(iter(named.values()), None)
    return str(template) if template else None


def check_chat(config: RunConfig) -> None:
    """Raise InputError if the template cannot be parsed, lacks an argument that it is given, or is missing."""
    template = template_of(config)
    if template is None:
        if config.data.as_messages and config.model.path is not None:
            what = f"the tokenizer of {config.model.path} has no chat template: set model.chat_template"
            raise InputError("data.as_messages", what)
        return
    names = _variables(template)
    for name in config.data.chat_template_kwargs:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it reads {', '.join(sorted(names))}"
            raise InputError("data.chat_template_kwargs", f"the chat template does not read {name!r}{hint}")


def _variables(template: str) -> set[str]:
    """Return the names of the arguments that a template reads. Raises InputError if it cannot be parsed."""
    from jinja2 import Environment, TemplateSyntaxError, ext, meta, nodes
    from jinja2.parser import Parser

    class Generation(ext.Extension):
        """Parses the block that marks the assistant's tokens, as transformers does."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(extensions=[Generation, ext.loopcontrols], autoescape=False)
    try:
        return set(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateSyntaxError as error:
        raise InputError("model.chat_template", f"line {error.lineno}: {error.message}") from error


def described_texts(config: RunConfig, num_rows: int, text: str) -> str:
    """Describe a data set of texts whose first row has this text, and what would be better to set."""
    if config.data.as_messages:
        return f"{num_rows:,} rows of text, wrapped as messages"
    notes = []
    if config.model.path is not None:
        spelled = control_tokens_in(text, local_model(config.model.path, weights=False))
        if spelled and not config.data.allow_special_tokens:
            notes.append(f"{spelled[0]} is read as text; data.allow_special_tokens = true makes it a control token")
        elif not spelled and template_of(config) is not None:
            notes.append("the model has a chat template; data.as_messages = true wraps them in it")
    return "; ".join([f"{num_rows:,} rows of text", *notes] if notes else [f"{num_rows:,} rows"])


def control_tokens_in(text: str, folder: Path) -> list[str]:
    """Return the control tokens of a model's tokenizer that a text spells."""
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    texts = (token["content"] for token in added if token["special"] or is_control(token["content"]))
    spellings = Spellings.of(texts)
    return [text[start:end] for start, end in spellings.spans(text)]
