"""Putting an image together: kernel, command line and three ramdisks.

The ramdisks are the system (Debian packages and wheels, pinned), the project's own code, and the
stage's files. So PCR1 stays the same for every stage and release on one system, PCR2 measures code
and stage, and PCR0 everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enclave import cpio, eif, imports, native, oci, rootfs
from enclave.errors import BuildError

PROJECT_ROOT: Final = Path(__file__).resolve().parent.parent
RECIPES: Final = Path(__file__).resolve().parent / "recipes"
# What nitro-cli gives its images; the hypervisor appends where the devices are.
DEFAULT_CMDLINE: Final = (
    "reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on root=/dev/ram0"
)
MAX_CMDLINE_BYTES: Final = 1024  # of the kernel's 2048, half is left to the hypervisor
# What runs inside: the first process, and what `pipeline-orch shard` has it start.
ROOTS: Final = ("enclave.init", "pipeline.cli.stage_worker")
STAGE_PREFIX: Final = "stage"


@dataclass(frozen=True, slots=True)
class System:
    """The pinned files a system ramdisk is made of."""

    debs: tuple[Path, ...]
    wheels: tuple[Path, ...]
    digest: str


def default_cache() -> Path:
    """Return where tools and what is made of them are kept. Raises: BuildError without a home."""
    if chosen := os.environ.get("VEILPIPE_CACHE"):
        return Path(chosen)
    # Not in the checkout: every clone builds the same tools from the same recipes.
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise BuildError("there is no home directory: set VEILPIPE_CACHE, or HOME") from None
    return Path(caches) / "veilpipe" / "enclave"


def find_system(cache: Path, *, with_wheels: bool) -> System:
    """Return the fetched files, each compared with its pinned SHA-256. Raises: BuildError."""
    debs = _pinned(RECIPES / "debian.lock", cache / "tools" / "debs")
    wheels = _pinned(RECIPES / "python.lock", cache / "tools" / "wheels") if with_wheels else {}
    # How archives are turned into entries is part of what the ramdisk depends on.
    code = Path(rootfs.__file__).read_bytes() + Path(cpio.__file__).read_bytes()
    digest = hashlib.sha256(code + json.dumps([*debs.values(), *wheels.values()]).encode())
    return System(tuple(debs), tuple(wheels), digest.hexdigest()[:16])


def system_ramdisk(system: System, cache: Path) -> Path:
    """Return the file of the system's ramdisk, made now unless it is cached. Raises: BuildError."""
    path = cache / "ramdisks" / f"{system.digest}.cpio"
    if not path.exists():
        entries = rootfs.system_entries(system.debs, system.wheels)
        write_atomically(path, cpio.pack(entries))
    return path


def code_closure(sources: Path = PROJECT_ROOT, roots: Sequence[str] = ROOTS) -> imports.Closure:
    """Return what a stage and init, or other `roots`, import of this project, and of others.

    Raises: BuildError.
    """
    return imports.closure(sources, roots, native.declared(sources))


def compiled_modules(cache: Path, sources: Path = PROJECT_ROOT) -> dict[str, bytes]:
    """Return the compiled modules a stage imports, compiled now unless cached. Raises: BuildError.

    They depend on their sources and the pinned compiler, not on what lies compiled in `sources`.
    """
    toolchain = _pinned(RECIPES / "toolchain.lock", cache / "tools" / "toolchain")
    extensions = native.declared(sources)
    modules = {}
    for name in code_closure(sources).compiled:
        digest = hashlib.sha256(extensions[name].digest(sources))
        digest.update(json.dumps(sorted(toolchain.values())).encode())
        path = cache / "compiled" / f"{digest.hexdigest()[:32]}.so"
        if not path.exists():
            code = native.compile_extension(sources, extensions[name], tuple(toolchain))
            write_atomically(path, [code])
        modules[name] = path.read_bytes()
    return modules


def code_ramdisk(compiled: Mapping[str, bytes], sources: Path = PROJECT_ROOT) -> bytes:
    """Return the ramdisk of init and what a stage imports of this project. Raises: BuildError."""
    files = code_closure(sources).files
    return b"".join(cpio.pack(rootfs.code_entries(sources, files, compiled)))


def container_layers(cache: Path, sources: Path = PROJECT_ROOT) -> list[list[cpio.Entry]]:
    """Return a container's layers: the system, and what its commands import. Raises: BuildError."""
    ramdisk = system_ramdisk(find_system(cache, with_wheels=True), cache).read_bytes()
    files = code_closure(sources, tuple(oci.COMMANDS.values())).files
    code = rootfs.module_entries(sources, files, compiled_modules(cache, sources))
    layers = (cpio.unpack(ramdisk), [*code, *oci.command_entries()])
    return [list(cpio.complete(layer)) for layer in layers]


def stage_ramdisk(directory: Path) -> bytes:
    """Return the ramdisk that holds `directory` as /stage. Raises: BuildError."""
    if not (directory / "run.json").is_file():
        raise BuildError(f"{directory} holds no run.json, the command to run")
    return b"".join(cpio.pack(rootfs.tree_entries(directory, STAGE_PREFIX)))


def build_image(
    kernel: eif.Buffer,
    cmdline: str,
    ramdisks: Iterable[eif.Buffer],
    metadata: dict[str, object],
    *,
    memory_bytes: int = 0,
    cpus: int = 0,
) -> eif.Image:
    """Return the image of these parts. Raises: BuildError or EifError."""
    line = cmdline.encode()
    if not cmdline.isascii() or not cmdline.isprintable() or len(line) > MAX_CMDLINE_BYTES:
        raise BuildError(f"the command line is not one of {MAX_CMDLINE_BYTES} printable characters")
    if bytes(kernel[514:518]) != b"HdrS":  # Linux Documentation/arch/x86/boot.rst
        raise BuildError("the kernel is no x86 bzImage")
    about = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    sections = (
        eif.Section(eif.SectionType.KERNEL, kernel),
        eif.Section(eif.SectionType.CMDLINE, line),
        *(eif.Section(eif.SectionType.RAMDISK, ramdisk) for ramdisk in ramdisks),
        eif.Section(eif.SectionType.METADATA, about),
    )
    return eif.Image(sections, default_memory_bytes=memory_bytes, default_cpus=cpus)


def describe_build(name: str, version: str, system: System) -> dict[str, object]:
    """Return the metadata of an image: the fields nitro-cli expects, nothing that varies."""
    return {
        "ImageName": name,
        "ImageVersion": version,
        "BuildMetadata": {
            "BuildTime": "1970-01-01T00:00:00+00:00",  # two builds must not differ
            "BuildTool": "veilpipe",
            "BuildToolVersion": version,
            "OperatingSystem": "Linux",
            "KernelVersion": "6.12",
        },
        "DockerInfo": {},
        "CustomMetadata": {"system": system.digest},
    }


def write_atomically(path: Path, pieces: Iterable[eif.Buffer]) -> None:
    """Write `pieces` to `path`, which has its whole content or does not change. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        temporary = Path(file.name)
        try:
            for piece in pieces:
                file.write(piece)
            file.flush()
            temporary.chmod(0o644)
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _pinned(lock: Path, directory: Path) -> dict[Path, str]:
    """Return the files of `directory` with their SHA-256, which are just those of `lock`."""
    lines = [line.split() for line in lock.read_text().splitlines() if not line.startswith("#")]
    wanted = {words[-1].removeprefix("--hash=sha256:"): words[0] for words in lines}
    found = {path: _sha256(path) for path in sorted(directory.glob("*"))}
    missing = [name for digest, name in wanted.items() if digest not in found.values()]
    extra = [path.name for path, digest in found.items() if digest not in wanted]
    if missing or extra:
        what = f"lacks {', '.join(missing)}" if missing else f"has unpinned {', '.join(extra)}"
        raise BuildError(f"{directory} {what}: run scripts/build_enclave_tools.sh --image-only")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
