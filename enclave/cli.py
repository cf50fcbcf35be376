"""The command line: build, describe, verify, pin and boot images.

Exit codes: 0 done, 1 the image does not verify, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from enclave import build, eif, oci, signing
from enclave.emulator import Machine, run_until_stopped
from enclave.errors import BuildError, EifError, EnclaveError
from enclave.pin import pin, pinned

_EXIT_MISMATCH: Final = 1
_EXIT_BAD_INPUT: Final = 2
# nitro-cli wants four times the image: the archive, its unpacked copy, and room to work.
_MEMORY_PER_IMAGE_BYTE: Final = 4
_MEMORY_FLOOR_BYTES: Final = 256 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except EnclaveError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_BAD_INPUT
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return _EXIT_BAD_INPUT
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -P -m enclave", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    describe = commands.add_parser("describe", help="print an image's contents and measurements")
    describe.add_argument("image", type=Path)
    describe.add_argument("-j", "--json", action="store_true")
    describe.set_defaults(run=_describe)

    verify = commands.add_parser("verify", help="check an image's structure, CRC, signature, PCRs")
    verify.add_argument("image", type=Path)
    verify.add_argument("--pcr", action="append", default=[], type=_register, metavar="INDEX=HEX")
    verify.add_argument("--manifest", type=Path, help="manifest whose pins it must match")
    verify.add_argument("--stage", type=int, help="index of the stage, with --manifest")
    verify.set_defaults(run=_verify)

    make = commands.add_parser("build", help="build the image of one stage")
    source = make.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--stage-dir", type=Path, help="directory that becomes /stage, run.json in it"
    )
    source.add_argument("--manifest", type=Path, help="manifest to cut a stage from, and to pin in")
    make.add_argument("--stage", type=int, help="index of the stage, with --manifest")
    make.add_argument("--model-dir", type=Path, help="the whole model, with --manifest")
    make.add_argument("-o", "--output", type=Path, required=True)
    make.add_argument("--kernel", type=Path, help="bzImage (default: the one in the cache)")
    make.add_argument("--cmdline", default=build.DEFAULT_CMDLINE)
    make.add_argument("--cache", type=Path)
    make.add_argument("--name", default="veilpipe-stage")
    make.add_argument("--cpus", type=int, default=2, help="default vCPUs (default 2)")
    make.add_argument("--memory-mib", type=int, help="default memory (default: from the size)")
    make.add_argument("--without-wheels", action="store_true", help="standard library only")
    make.add_argument("--signing-key", type=Path, help="PEM key; adds a signature and PCR8")
    make.add_argument("--signing-certificate", type=Path)
    make.add_argument("-j", "--json", action="store_true")
    make.set_defaults(run=_build)

    container = commands.add_parser("container", help="the same as a container image (OCI layout)")
    container.add_argument("-o", "--output", type=Path, required=True, help="a new directory")
    container.add_argument("--cache", type=Path)
    container.add_argument("--name", default="veilpipe")
    container.set_defaults(run=_container)

    boot = commands.add_parser("boot", help="boot an image under QEMU, until interrupted")
    boot.add_argument("image", type=Path)
    boot.add_argument("--vsock", type=Path, required=True, help="Unix socket that leads inside")
    boot.add_argument("--console", type=Path, required=True, help="file for the console's output")
    boot.add_argument("--cid", type=int, default=16)
    boot.add_argument("--cpus", type=int, default=2)
    boot.add_argument("--memory-mib", type=int, default=4096)
    boot.add_argument("--signing-dir", type=Path, help="test key and chain for documents")
    boot.add_argument("--cache", type=Path)
    boot.set_defaults(run=_boot)

    pinning = commands.add_parser("pin", help="write an image's measurements into a manifest")
    pinning.add_argument("image", type=Path)
    pinning.add_argument("--manifest", type=Path, required=True)
    pinning.add_argument("--stage", type=int, required=True)
    pinning.set_defaults(run=_pin)
    return parser


def _describe(options: argparse.Namespace) -> int:
    with _opened(options.image) as image:
        _print_report(_report(image), as_json=options.json)
    return 0


def _verify(options: argparse.Namespace) -> int:
    if (options.manifest is None) != (options.stage is None):
        raise BuildError("--manifest and --stage go together")
    expected = list(options.pcr)
    if options.manifest is not None:
        expected += pinned(options.manifest, options.stage).items()
    with _opened(options.image) as image:
        pcrs = eif.measure(image)
        if image.of_type(eif.SectionType.SIGNATURE):
            signing.verify(image)
        wrong = [index for index, value in expected if pcrs.get(index) != value]
    for index in wrong:
        actual = pcrs[index].hex() if index in pcrs else "absent"
        print(f"PCR{index} differs: the image has {actual}", file=sys.stderr)
    if wrong:
        return _EXIT_MISMATCH
    print(f"ok: {options.image}, {len(expected)} PCRs compared")
    return 0


def _boot(options: argparse.Namespace) -> int:
    machine = Machine(
        options.image,
        options.vsock,
        options.console,
        cid=options.cid,
        cpus=options.cpus,
        memory_mib=options.memory_mib,
        signing_dir=options.signing_dir,
    )
    run_until_stopped(machine, (options.cache or build.default_cache()) / "tools")
    return 0


def _pin(options: argparse.Namespace) -> int:
    with _opened(options.image) as image:
        pin(options.manifest, options.stage, eif.measure(image))
    print(f"pinned stage {options.stage} in {options.manifest}")
    return 0


def _build(options: argparse.Namespace) -> int:
    if (options.signing_key is None) != (options.signing_certificate is None):
        raise BuildError("--signing-key and --signing-certificate go together")
    with _stage_directory(options) as directory:
        image = _assemble(options, directory)
    build.write_atomically(options.output, eif.pack(image))
    if options.manifest is not None:
        pin(options.manifest, options.stage, eif.measure(image))
    _print_report(_report(image), as_json=options.json)
    return 0


def _container(options: argparse.Namespace) -> int:
    layers = build.container_layers(options.cache or build.default_cache())
    print(f"{options.name}@{oci.write_layout(options.output, options.name, layers)}")
    return 0


def _assemble(options: argparse.Namespace, directory: Path) -> eif.Image:
    cache = options.cache or build.default_cache()
    system = build.find_system(cache, with_wheels=not options.without_wheels)
    kernel = (options.kernel or cache / "tools" / "vmlinuz").read_bytes()
    ramdisks: list[eif.Buffer] = [
        build.system_ramdisk(system, cache).read_bytes(),
        build.code_ramdisk(build.compiled_modules(cache)),
        build.stage_ramdisk(directory),
    ]
    image_bytes = len(kernel) + sum(map(len, ramdisks))
    memory_bytes = _MEMORY_FLOOR_BYTES + _MEMORY_PER_IMAGE_BYTE * image_bytes
    if options.memory_mib is not None:
        memory_bytes = options.memory_mib << 20
    image = build.build_image(
        kernel,
        options.cmdline,
        ramdisks,
        build.describe_build(options.name, _version(), system),
        memory_bytes=memory_bytes,
        cpus=options.cpus,
    )
    if options.signing_key is None:
        return image
    key, certificate = options.signing_key.read_bytes(), options.signing_certificate.read_bytes()
    return signing.sign(image, key, certificate)


@contextmanager
def _stage_directory(options: argparse.Namespace) -> Iterator[Path]:
    """Give the stage's files: the directory named, or one freshly cut from the whole model."""
    if options.stage_dir is not None:
        yield options.stage_dir
        return
    if options.stage is None or options.model_dir is None:
        raise BuildError("--manifest needs --stage and --model-dir")
    with tempfile.TemporaryDirectory(prefix="veilpipe-stage-") as name:
        # Beside this Python first: a virtual environment need not be activated. Never a relative
        # entry: what lies in the current directory is not this project's.
        search = [str(Path(sys.executable).parent), *os.get_exec_path()]
        absolute = os.pathsep.join(entry for entry in search if Path(entry).is_absolute())
        program = shutil.which("pipeline-orch", path=absolute)
        if program is None:
            raise BuildError("pipeline-orch, which cuts the stage from the model, is not installed")
        command = [program, "shard", "--manifest", str(options.manifest)]
        command += ["--stage", str(options.stage), "--model-dir", str(options.model_dir)]
        try:
            subprocess.run([*command, "-o", name], check=True)  # noqa: S603
        except subprocess.CalledProcessError as error:
            raise BuildError(f"cannot cut stage {options.stage} from the model") from error
        yield Path(name)


@contextmanager
def _opened(path: Path) -> Iterator[eif.Image]:
    """Give the image of a file, mapped: images are larger than one wants to copy."""
    if not path.is_file() or path.stat().st_size == 0:
        raise EifError(f"{path} is no image, or empty")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        yield eif.unpack(memoryview(mapped))
    except EifError as error:
        raise EifError(f"{path}: {error}") from error


def _register(text: str) -> tuple[int, bytes]:
    index, _, value = text.partition("=")
    try:
        number, digest = int(index.upper().removeprefix("PCR")), bytes.fromhex(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not INDEX=HEX") from None
    if not 0 <= number < 32 or len(digest) != eif.PCR_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: an index below 32 and {2 * eif.PCR_BYTES} hexadecimal digits, please"
        )
    return number, digest


def _report(image: eif.Image) -> dict[str, object]:
    return {
        "Measurements": {
            "HashAlgorithm": "Sha384",
            **{f"PCR{index}": value.hex() for index, value in eif.measure(image).items()},
        },
        "DefaultMemoryMiB": image.default_memory_bytes >> 20,
        "DefaultCpus": image.default_cpus,
        "Cmdline": bytes(image.of_type(eif.SectionType.CMDLINE)[0]).decode(errors="replace"),
        "Sections": [f"{each.type.name.lower()} {len(each.data)}" for each in image.sections],
    }


def _print_report(report: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        nested = value.items() if isinstance(value, dict) else [(name, value)]
        for label, each in nested:
            text = ", ".join(each) if isinstance(each, list) else each
            print(f"{label}: {text}")


def _version() -> str:
    try:
        return version("veilpipe")
    except PackageNotFoundError:
        return "unknown"
