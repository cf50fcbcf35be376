"""The system and the code of a stage as a container image, for hosts that nobody attests.

Its layers are what an enclave's first two ramdisks hold, so the same inputs give the same digest;
no base image, daemon or root takes part. Nothing is compressed, since compressors differ: whoever
carries it to a registry does that. Source: OCI image specification 1.1.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enclave import cpio
from enclave.errors import BuildError

# No account of any host's.
USER: Final = 65532
# The modules whose `main` a container may be told to run, by the command's name.
COMMANDS: Final = {
    "stage-worker": "pipeline.cli.stage_worker",
    "pipeline-relay": "transport.relay_cli",
}
# As the entry points of an installation set them, which are not in here.
_ENVIRONMENT: Final = (
    "PATH=/usr/local/bin:/usr/bin:/bin",
    "HOME=/tmp",
    "OPENBLAS_NUM_THREADS=1",
    "PYDANTIC_DISABLE_PLUGINS=__all__",
)
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True, slots=True)
class _Blob:
    digest: str  # as "sha256:" and hexadecimal digits
    size: int

    def described(self, media_type: str) -> dict[str, object]:
        return {"mediaType": media_type, "digest": self.digest, "size": self.size}


def command_entries() -> list[cpio.Entry]:
    """Return the commands, and what an enclave is without: the names of other hosts."""
    return [
        cpio.regular("etc/nsswitch.conf", b"hosts: files dns\n"),
        *(
            cpio.regular(f"usr/local/bin/{name}", _script(module), 0o755)
            for name, module in COMMANDS.items()
        ),
    ]


def write_layout(output: Path, name: str, layers: Iterable[Iterable[cpio.Entry]]) -> str:
    """Write an image of these layers as an OCI layout in a new directory; returns its digest.

    Raises: BuildError where the directory is there, OSError where it cannot be written.
    """
    with _new_directory(output) as directory:
        blobs = directory / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        written = [_write_layer(blobs, layer) for layer in layers]
        config = _write_json(blobs, _config(written))
        manifest = _write_json(
            blobs,
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": config.described(_CONFIG),
                "layers": [layer.described(_LAYER) for layer in written],
            },
        )
        named = {"annotations": {"org.opencontainers.image.ref.name": name}}
        index = {"schemaVersion": 2, "manifests": [manifest.described(_MANIFEST) | named]}
        (directory / "index.json").write_bytes(_encoded(index))
        (directory / "oci-layout").write_bytes(_encoded({"imageLayoutVersion": "1.0.0"}))
    return manifest.digest


def _script(module: str) -> bytes:
    # -I: no environment, no user packages; -B: nothing is written next to the sources.
    return f"#!/usr/bin/python3 -IB\nfrom {module} import main\n\nmain()\n".encode()


def _config(layers: list[_Blob]) -> dict[str, object]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "User": f"{USER}:{USER}",
            "Env": list(_ENVIRONMENT),
            "Cmd": ["stage-worker", "--help"],
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }


def _write_layer(blobs: Path, entries: Iterable[cpio.Entry]) -> _Blob:
    """Write the archive: owned by root, dated 1970, in the order of the entries."""
    path = blobs / "layer"
    with tarfile.open(path, "x", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            if (member := _member(entry)) is not None:
                archive.addfile(member, io.BytesIO(entry.data))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path.rename(blobs / digest)
    return _Blob(f"sha256:{digest}", (blobs / digest).stat().st_size)


def _member(entry: cpio.Entry) -> tarfile.TarInfo | None:
    """Return an entry's header; None for devices, which whoever runs a container brings."""
    member = tarfile.TarInfo(entry.path)
    member.mode = stat.S_IMODE(entry.mode)
    if stat.S_ISDIR(entry.mode):
        member.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(entry.mode):
        member.type, member.linkname = tarfile.SYMTYPE, bytes(entry.data).decode()
    elif stat.S_ISREG(entry.mode):
        member.size = len(entry.data)
    else:
        return None
    return member


def _write_json(blobs: Path, value: Mapping[str, object]) -> _Blob:
    data = _encoded(value)
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return _Blob(f"sha256:{digest}", len(data))


def _encoded(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory that appears as `output` when it is complete, or not at all."""
    if output.exists():
        raise BuildError(f"{output} exists; choose another")
    output.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        yield directory
        directory.chmod(0o755)
        directory.rename(output)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
