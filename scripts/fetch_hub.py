"""Fetch a model's files from a Hugging Face hub into a directory, checksums compared.

    python scripts/fetch_hub.py openai-community/gpt2 DIRECTORY

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface-hub.
"""

import argparse
import hashlib
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import disable_progress_bars

# The HTTP library is huggingface-hub's own choice and has changed; the root of its errors is the
# base of the hub's.
HTTP_ERROR: type[Exception] = next(
    cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError"
)
REQUIRED = ("config.json", "tokenizer.json", "model.safetensors")
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "vocab.json", "merges.txt")
SHA256_HEX = re.compile(r"[0-9a-f]{64}")


def fetch(repo: str, name: str, directory: Path) -> None:
    """One file, through the hub's cache; a large file's SHA-256 is the tag the hub gives it."""
    cached = Path(hf_hub_download(repo, name))
    target = directory / name
    shutil.copyfile(cached, target)
    if constants.HF_HUB_OFFLINE:
        return
    tag = get_hf_file_metadata(hf_hub_url(repo, name)).etag
    if tag is None or not SHA256_HEX.fullmatch(tag):
        return
    with target.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != tag:
        raise ChecksumError(
            f"{name} has SHA-256 {actual}, the hub says {tag}: "
            f"delete {cached.resolve()} and fetch again"
        )


class ChecksumError(Exception):
    """A downloaded file is not what the hub announced."""


def fetch_model(repo: str, directory: Path) -> None:
    """All files of a model, small ones first: a wrong name fails before the big download."""
    for name in (*REQUIRED, *OPTIONAL):
        try:
            fetch(repo, name, directory)
        except LocalEntryNotFoundError as error:
            if name in REQUIRED or not constants.HF_HUB_OFFLINE:
                raise error
        except EntryNotFoundError:
            if name in REQUIRED:
                raise


def explain(repo: str, error: Exception) -> str:
    """One line: what failed, and what to do."""
    endpoint = constants.ENDPOINT
    if isinstance(error, ChecksumError):
        return str(error)
    if constants.HF_HUB_OFFLINE:
        return f"{repo} is not in the cache {constants.HF_HUB_CACHE}: unset HF_HUB_OFFLINE"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{endpoint}/{repo} has no such file ({_first_line(error)}): choose another model"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return f"{endpoint} answers {status} for {repo}: check the name, HF_ENDPOINT and HF_TOKEN"
    return f"cannot reach {endpoint} for {repo}: check the network, or set HF_ENDPOINT to a mirror"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("repo", help="such as openai-community/gpt2")
    parser.add_argument("directory", type=Path, help="where to write; made if absent")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if not sys.stderr.isatty():
        disable_progress_bars()  # the hub's own, which would fill a log
    try:
        fetch_model(arguments.repo, arguments.directory)
    except (
        HfHubHTTPError,
        EntryNotFoundError,
        OfflineModeIsEnabled,
        ChecksumError,
        HTTP_ERROR,
        OSError,
    ) as error:
        print(f"fetch_hub: error: {explain(arguments.repo, error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
