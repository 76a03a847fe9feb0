"""Puts the chat settings of a run file into the folder of its initial model, from which later models take them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

from cluster.data.chat_settings import SETTINGS_FILE, ChatSettings
from cluster.files import replacing_folder
from cluster.hub.download import local_model
from deploy.config.chat import TEMPLATE_FILE, chat_template, folder_template, has_chat_settings, writes_date
from deploy.config.schema import RunConfig

NAMED_TEMPLATES = "additional_chat_templates"
"""The folder of templates for other uses, such as tools, in a model folder."""


def prepare_chat_model(config: RunConfig, target: Path) -> None:
    """Write the run's chat settings into `target`, the model that a builder made, or a folder of links to the model."""
    if config.model.path is None:
        if has_chat_settings(config) or writes_date(folder_template(target)):
            _write(config, target)
    elif not has_chat_settings(config):
        return
    elif not target.exists():
        with replacing_folder(target) as partial:
            for file in sorted(local_model(config.model.path).iterdir()):
                if file.is_file() or file.name == NAMED_TEMPLATES:
                    (partial / file.name).symlink_to(file.resolve())
            _write(config, partial)


def _write(config: RunConfig, folder: Path) -> None:
    before, own = ChatSettings.of(folder), config.data.chat_settings()
    template = chat_template(config)
    if template is not None:
        named = folder / NAMED_TEMPLATES
        if named.is_symlink():
            named.unlink()
        shutil.rmtree(named, ignore_errors=True)
        (folder / TEMPLATE_FILE).unlink(missing_ok=True)
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    (folder / SETTINGS_FILE).unlink(missing_ok=True)
    settings = own.over(before)
    if settings.date is None and writes_date(folder_template(folder)):
        settings = replace(settings, date=date.today().isoformat())
    settings.write(folder)
