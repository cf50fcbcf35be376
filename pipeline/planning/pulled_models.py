"""Models by name: what the Hugging Face hub's cache holds, and copies of directories beside it.

huggingface-hub is imported where it is needed: it takes as long as all of a command's own.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import InputError, ModelError
from pipeline.files import is_file
from pipeline.models.config import CONFIG_FILE
from pipeline.weights.checkpoint import weight_files

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

# A word, or an owner's and one, as no absolute path is; behind @ a branch, a tag or a commit.
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"({_WORD}(?:/{_WORD})?)(?:@({_WORD}(?:/{_WORD})*))?")
MAIN = "main"


class ModelName(NamedTuple):
    """What a model is called: a repository of the hub's and which of its revisions, or a copy."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


class PulledModel(NamedTuple):
    """One that is here: what to call it by, where its files are, and how much they take."""

    name: ModelName
    directory: Path
    num_bytes: int


def parse_name(text: str) -> ModelName | None:
    """The name that `text` is, if it is one."""
    found = _NAME.fullmatch(text)
    return None if found is None else ModelName(found[1], found[2])


def copies_directory() -> Path:
    """Where copies of directories are kept, each under its name. Raises InputError."""
    if data := os.environ.get("XDG_DATA_HOME"):
        return Path(data) / "veilpipe" / "models"
    try:
        return Path.home() / ".local" / "share" / "veilpipe" / "models"
    except RuntimeError as error:
        raise InputError("there is no home directory: set XDG_DATA_HOME") from error


def find_model(name: ModelName) -> Path | None:
    """The directory of a model that has been pulled. Raises InputError where it is not whole."""
    directory = copies_directory() / name.repo
    if name.revision is not None or not is_file(directory / CONFIG_FILE):
        found = _in_cache(name)
        if found is None:
            return None
        directory = found
    check_whole(name, directory)
    return directory


def check_whole(name: ModelName, directory: Path) -> None:
    """Raises InputError where files of a model are missing."""
    try:
        missing = [path for path in weight_files(directory) if not is_file(path)]
    except ModelError:
        missing = [directory]
    if missing or not is_file(directory / CONFIG_FILE):
        raise InputError(f"{name} has not been fetched whole: pipeline-orch pull {name}")


def _in_cache(name: ModelName) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    found = try_to_load_from_cache(name.repo, CONFIG_FILE, revision=name.revision)
    return Path(found).parent if isinstance(found, str) else None


def pulled_models() -> Iterator[PulledModel]:
    """All that are here, copies first, each by the shortest name it has."""
    directory = copies_directory()
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if parse_name(path.name) is not None and is_file(path / CONFIG_FILE):
            num_bytes = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
            yield PulledModel(ModelName(path.name), path, num_bytes)
    cached = [repo for repo in _cache().repos if repo.repo_type == "model"]
    for repo in sorted(cached, key=lambda repo: str(repo.repo_id)):
        for revision in sorted(repo.revisions, key=lambda each: str(each.commit_hash)):
            if is_file(revision.snapshot_path / CONFIG_FILE):
                refs = sorted(revision.refs) or [revision.commit_hash]
                name = ModelName(repo.repo_id, None if MAIN in refs else refs[0])
                yield PulledModel(name, revision.snapshot_path, revision.size_on_disk)


def remove_model(name: ModelName) -> None:
    """Delete a copy, or from the hub's cache a revision, or all of them where none is named.

    Raises InputError for what is not there, or cannot be deleted.
    """
    directory = copies_directory() / name.repo
    if name.revision is None and is_file(directory / CONFIG_FILE):
        try:
            shutil.rmtree(directory)
        except OSError as error:
            raise InputError(f"cannot remove {directory}: {error.strerror}") from error
        return
    commits = [
        revision.commit_hash
        for repo in _cache().repos
        if (repo.repo_type, repo.repo_id) == ("model", name.repo)
        for revision in repo.revisions
        if name.revision in {None, revision.commit_hash, *revision.refs}
    ]
    if not commits:
        raise InputError(f"no model {name} has been pulled; pipeline-orch models lists them")
    _cache().delete_revisions(*commits).execute()


def _cache() -> "HFCacheInfo":
    from huggingface_hub import constants, scan_cache_dir  # noqa: PLC0415

    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    return scan_cache_dir(constants.HF_HUB_CACHE)
