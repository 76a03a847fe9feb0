"""Download models and data sets of the Hub into its local cache, and find them there without a network.

Only safetensors weights are downloaded, and no code. Every function raises InputError that names the repository and
says what to do: log in, accept the terms of a gated repository, or download on a machine with a network.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import InputError, first_line
from cluster.hub.names import HubName, hub_name

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
IGNORED = ("*/*", "consolidated*", "*.index.fp*.json", "tf_model*", "flax_model*")
"""Files of other formats, and subfolders, which hold the same weights for other programs."""


def local_model(path: Path, *, weights: bool = True) -> Path:
    """Return the folder of a model: `path` itself, or a Hub model's download, with `weights` or only with its settings.

    Raises InputError if the Hub has no such model, if it has no safetensors weights, or if it can't be downloaded.
    """
    name = hub_name(path, "model")
    return path if name is None else _model_folder(name, weights)


def local_data(path: Path) -> Path:
    """Return the file or folder of a data set: `path` itself, or a folder with the files of a Hub data set's split.

    Raises InputError if the Hub has no such data set, configuration or split, or if it can't be downloaded.
    """
    name = hub_name(path, "dataset")
    return path if name is None else _data_folder(name)


@functools.cache
def commit_of(name: HubName) -> str:
    """Return the commit hash of a name's revision; without a network, the one that was last downloaded."""
    from huggingface_hub import HfApi

    if name.commit is not None:
        return name.commit
    with _explained(name):
        return str(HfApi().resolve_revision(name.repo, repo_type=name.kind, revision=name.revision).resolved)


@functools.cache
def _model_folder(name: HubName, weights: bool) -> Path:
    patterns = [*TOKENIZER_FILES, *(["*.safetensors"] if weights else [])]
    folder = _snapshot(name, patterns, IGNORED)
    files = [str(file.name) for file in folder.iterdir()] if weights else _files(name)
    if files is not None and not any(file.endswith(".safetensors") for file in files):
        raise InputError(name.text, _no_weights(name, _files(name) or ()))
    return folder


def _no_weights(name: HubName, files: Sequence[str]) -> str:
    if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        convert = (
            f"AutoModelForCausalLM.from_pretrained({name.repo!r}).save_pretrained('FOLDER') of transformers, then set"
            " it to FOLDER"
        )
        return f"has its weights as pickle files only, which can run code when read: convert them with {convert}"
    return "has no *.safetensors weights: is it a repository of adapters, of another format or a data set?"


@functools.cache
def _files(name: HubName) -> list[str] | None:
    """Return the names of a repository's files outside its folders; None if the Hub can't be reached."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with _explained(name):
            files = HfApi().list_repo_files(name.repo, repo_type=name.kind, revision=commit_of(name))
    except InputError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled | httpx2.TransportError):
            return None
        raise
    return [file for file in files if "/" not in file]


def _snapshot(name: HubName, patterns: list[str], ignored: tuple[str, ...] = ()) -> Path:
    from huggingface_hub import snapshot_download

    with _explained(name):
        folder = snapshot_download(
            name.repo,
            repo_type=name.kind,
            revision=commit_of(name),
            allow_patterns=patterns,
            ignore_patterns=list(ignored),
        )
    return Path(folder)


@functools.cache
def _data_folder(name: HubName) -> Path:
    """Return a folder beside the Hub's cache with links to the files of one split."""
    from huggingface_hub import constants

    repo = name.repo.replace("/", "--")
    parts = ("antiphon", repo, commit_of(name), name.config or "default-config", name.split or "train")
    target = Path(constants.HF_HOME).joinpath(*parts)
    if not target.is_dir():
        _link(_data_files(name), target)
    return target


def _link(files: list[Path], target: Path) -> None:
    """Make `target` a folder of links to `files`, at once, so that no reader finds a part of them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    width = len(str(len(files)))
    for number, file in enumerate(files):
        link = f"{number:0{width}d}-{file.name}" if len({file.name for file in files}) < len(files) else file.name
        (folder / link).symlink_to(file.absolute())
    try:
        os.rename(folder, target)
    except OSError:
        shutil.rmtree(folder)
        if not target.is_dir():  # otherwise another process has just made it
            raise


def _data_files(name: HubName) -> list[Path]:
    """Return the downloaded files of a split, in the order that `datasets` gives them."""
    urls = _urls(name)
    prefix = f"hf://datasets/{name.repo}@"
    if not all(url.startswith(prefix) for url in urls):
        return [Path(url) for url in urls]
    pairs = [url.removeprefix(prefix).split("/", 1) for url in urls]
    folders = {
        revision: _snapshot(name.at(revision), [file for of, file in pairs if of == revision])
        for revision in {revision for revision, _ in pairs}
    }
    return [folders[revision] / file for revision, file in pairs]


def _urls(name: HubName) -> list[str]:
    """Return the files of a split: URLs of the Hub, or paths if an offline machine has the whole repository."""
    from huggingface_hub import constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        return _split_files(name, name.repo, commit_of(name))
    with _explained(name):
        folder = snapshot_download(name.repo, repo_type="dataset", revision=commit_of(name), local_files_only=True)
    return _split_files(name, folder, None)


def _split_files(name: HubName, source: str, revision: str | None) -> list[str]:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    with _explained(name):
        try:
            builder = load_dataset_builder(source, name.config, revision=revision)
        except (DatasetsError, RuntimeError, ValueError) as error:  # an unknown configuration, no files, a script
            raise InputError(name.text, " ".join(str(error).split())) from error
    splits = builder.config.data_files or {}
    if name.split not in splits:
        known = ", ".join(map(str, splits)) or "none with files of a known format"
        raise InputError(name.text, f"the data set has no split {name.split!r}; its splits: {known}")
    return [str(file) for file in splits[name.split]]


@contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn an error of the Hub's library into an InputError that says what to do."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        what = f"is gated: accept its terms at {_page(name)}, then log in with `hf auth login` or set HF_TOKEN"
        raise InputError(name.text, what) from error
    except errors.RepositoryNotFoundError as error:
        what = f"there is neither such a file or folder here nor such a {name.kind} at {_page(name)}"
        login = "for a private one, log in with `hf auth login` or set HF_TOKEN"
        raise InputError(name.text, f"{what} ({login})") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(name.text, f"{name.repo} has no revision {name.revision!r} (see {_page(name)})") from error
    except (errors.HFValidationError, errors.HfHubHTTPError) as error:
        raise InputError(name.text, f"the Hub refuses it: {first_line(error)}") from error
    except (OSError, httpx2.HTTPError, errors.RevisionResolutionError) as error:
        raise InputError(name.text, _unreachable(name, error)) from error


def _page(name: HubName) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if name.kind == 'dataset' else ''}{name.repo}"


def _unreachable(name: HubName, error: BaseException) -> str:
    options = " --repo-type dataset" if name.kind == "dataset" else ""
    revision = f" --revision {name.revision}" if name.revision else ""
    command = f"hf download {name.repo}{options}{revision}"
    cause = error.__cause__ or error
    why = "HF_HUB_OFFLINE is set" if type(cause).__name__ == "OfflineModeIsEnabled" else first_line(cause)
    return (
        f"is no file or folder here, nor in the cache of the Hub, which can't be reached ({why}): run `{command}` where"
        " there is a network, with the same HF_HOME"
    )
