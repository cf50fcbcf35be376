"""Fetches models: from a Hugging Face hub into its cache, or from a directory.

HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to
huggingface-hub, which goes on where a download was cut. Only what a pipeline reads is fetched:
configuration, tokenizer, template, and weights as safetensors; never pickles or code.
"""

import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.errors import FetchError, InputError
from pipeline.files import is_file
from pipeline.models.config import CONFIG_FILE, load_config
from pipeline.planning.pulled_models import (
    MAIN,
    ModelName,
    check_whole,
    copies_directory,
    find_model,
    parse_name,
)
from pipeline.planning.shard import TEXT_FILES
from pipeline.progress import Meter, Progress
from pipeline.weights.checkpoint import hash_files, weight_files
from pipeline.weights.checkpoint_index import INDEX_FILE, SINGLE_FILE

# What the cache calls a large file: its SHA-256.
_SHA256_HEX = re.compile(r"[0-9a-f]{64}")
# Files are named exactly: what would be a pattern in a name stands for itself.
_AS_IT_IS = str.maketrans({"[": "[[]", "*": "[*]", "?": "[?]"})
# The HTTP library is huggingface-hub's own choice and has changed; the root of its errors is the
# base of the hub's.
_HTTP_ERROR: type[Exception] = next(
    cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError"
)


def pull(name: ModelName, progress: Progress | None = None) -> Path:
    """Fetch what is missing of a model, and hold its weights against the hub's checksums.

    Raises InputError for a model that there is not or that no stage computes, FetchError where hub
    or network fail.
    """
    if constants.HF_HUB_OFFLINE:
        found = find_model(name)
        if found is None:
            cache = constants.HF_HUB_CACHE
            raise InputError(f"{name} is not in the cache {cache}: unset HF_HUB_OFFLINE")
        return found
    with _translated(name):
        info = HfApi().model_info(name.repo, revision=name.revision)
        files = {each.rfilename for each in info.siblings or ()}
        weights = {SINGLE_FILE, INDEX_FILE} & files
        if CONFIG_FILE not in files or not weights:
            raise InputError(
                f"{name} has no {CONFIG_FILE}, or no {SINGLE_FILE} or {INDEX_FILE}: "
                "choose a model that is stored as safetensors"
            )
        is_single = SINGLE_FILE in weights
        listing = set() if is_single else {INDEX_FILE}
        directory = _fetch(name, name.revision, files & {CONFIG_FILE, *TEXT_FILES, *listing})
        load_config(directory)  # before the large download
        if not is_single:
            weights = {path.relative_to(directory).as_posix() for path in weight_files(directory)}
        if directory.name != info.sha or not weights <= files:
            raise FetchError(f"{name} lacks files that it names, or has changed: pull it again")
        _fetch(name, info.sha, weights)
    check_whole(name, directory)
    _check_sums(name, [directory / each for each in sorted(weights)], progress)
    return directory


def copy_model(source: Path, target: Path | None = None, progress: Progress | None = None) -> Path:
    """Copy what a pipeline reads of a model's directory to a new one: `target`, or its name's.

    Raises InputError.
    """
    load_config(source)
    if target is None:
        name = source.resolve().name
        found = parse_name(name)
        if found is None or str(found) != name or found.revision is not None:
            raise InputError(f"{source}: {name!r} is no name for a model; rename the directory")
        target = copies_directory() / name
    if target.exists():
        raise InputError(f"{target} exists already; to replace it: pipeline-orch models remove")
    weights = weight_files(source)
    names = [CONFIG_FILE, *TEXT_FILES, *([] if is_file(source / SINGLE_FILE) else [INDEX_FILE])]
    files = [path for path in (source / name for name in names) if is_file(path)] + weights
    try:
        meter = Meter(sum(path.stat().st_size for path in files), progress)
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".pull-", dir=target.parent) as made:
            whole = Path(made) / "model"
            for path in files:
                copy = whole / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                meter.add(path.stat().st_size)
            whole.rename(target)
    except OSError as error:
        raise InputError(f"cannot copy {source} to {target}: {error.strerror}") from error
    return target


def _fetch(name: ModelName, revision: str | None, files: Collection[str]) -> Path:
    patterns = [each.translate(_AS_IT_IS) for each in files]
    found = snapshot_download(name.repo, revision=revision or MAIN, allow_patterns=patterns)
    return Path(found)


def _check_sums(name: ModelName, files: Sequence[Path], progress: Progress | None) -> None:
    """Hold files against the sums that the cache calls them by. Raises FetchError."""
    named = [path for path in map(Path.resolve, files) if _SHA256_HEX.fullmatch(path.name)]
    for path, digest in zip(named, hash_files(named, progress), strict=True):
        if digest != path.name:
            path.unlink()
            raise FetchError(f"{name}: a file's SHA-256 is not what the hub says: pull it again")


@contextmanager
def _translated(name: ModelName) -> Iterator[None]:
    """Raises what the hub and the network may fail with as one line."""
    endpoint = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"{endpoint}/{name.repo} is gated: ask for access, set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{endpoint} has no model {name.repo}, or HF_TOKEN is not set") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name.repo} has no revision {name.revision}") from error
    except LocalEntryNotFoundError as error:
        raise FetchError(_unreachable(name)) from error
    except HfHubHTTPError as error:
        if error.response is None:
            raise FetchError(_unreachable(name)) from error
        status = error.response.status_code
        raise FetchError(
            f"{endpoint} answers {status} for {name}: check HF_ENDPOINT and HF_TOKEN"
        ) from error
    except _HTTP_ERROR as error:
        raise FetchError(_unreachable(name)) from error
    except OSError as error:
        raise FetchError(f"cannot store {name} in {constants.HF_HUB_CACHE}: {error}") from error


def _unreachable(name: ModelName) -> str:
    endpoint = constants.ENDPOINT
    return f"cannot reach {endpoint} for {name}: check the network, or set HF_ENDPOINT to a mirror"
