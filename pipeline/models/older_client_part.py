"""The older layout of a client's part: one file, whose tensors have names of their own.

`client_weights.safetensors` holds `embed_tokens.weight` and `lm_head.weight`, a head tied to the
embedding written out as well. Servers of that layout applied the final norm; here whoever holds the
head does. So what is written has `norm.weight` too, which readers of the older kind leave alone,
and where a file has none, the norm is that of the model beside it, pinned like the file itself.
"""

from collections.abc import Collection
from pathlib import Path

from pipeline.files import is_file
from pipeline.models.ends import Names
from pipeline.weights.checkpoint_index import INDEX_FILE, SINGLE_FILE

CLIENT_FILE = "client_weights.safetensors"
EMBEDDING, HEAD, NORM = "embed_tokens", "lm_head", "norm"


def client_weights(path: Path) -> Path:
    """Where a client's part in `path` has its weights: a directory as any model, or the file."""
    is_model = is_file(path / SINGLE_FILE) or is_file(path / INDEX_FILE)
    return path / CLIENT_FILE if not is_model and is_file(path / CLIENT_FILE) else path


def is_older_layout(stored: Collection[str]) -> bool:
    """Whether these are names of that layout: no family's checkpoints have them."""
    return f"{EMBEDDING}.weight" in stored


def older_name(names: Names, name: str) -> str:
    """What that layout calls a tensor of the model's ends; others, such as positions, keep it."""
    for own, older in ((names.embedding, EMBEDDING), (names.head, HEAD), (names.norm, NORM)):
        if name.startswith(f"{own}."):
            return older + name.removeprefix(own)
    return name


def names_in_file(
    names: Names, ordinary: dict[str, str], stored: Collection[str]
) -> dict[str, str]:
    """Our name -> the stored one; a norm that is not in the file has its `ordinary` name."""
    found = {name: older_name(names, name) for name in ordinary}
    return {
        name: ordinary[name] if older not in stored and name.startswith(f"{names.norm}.") else older
        for name, older in found.items()
    }
