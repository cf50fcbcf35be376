"""The flags of commands for one's own machines, at home."""

from pathlib import Path
from typing import Annotated

from pipeline.cli.compute_options import DTypeFlag
from pipeline.cli.model_directory import ModelDir
from pipeline.cli.settings import Address, Flag, Settings
from pipeline.cli.shared_options import ManifestFlag, VerboseFlag
from pipeline.errors import InputError
from transport.dial_and_listen import Endpoint, TcpEndpoint

DEFAULT_OUTPUT = Path("cluster.json")


class JoinFlags(Settings):
    """What is split over which machines, and where that is written."""

    model_dir: Annotated[
        ModelDir, Flag("DIR|NAME", "config.json, weights and tokenizer of the model.")
    ]
    output: Annotated[
        Path, Flag("FILE", "The manifest; one that is there is added to.", ("--output", "-o"))
    ] = DEFAULT_OUTPUT
    push: Annotated[bool, Flag(None, "Send the parts and have them served, too.")] = False
    remove: Annotated[
        tuple[str, ...],
        Flag("MACHINE", "Leave this one out: its HOST:PORT or fingerprint.", is_by_hand=True),
    ] = ()
    dtype: DTypeFlag = None
    home: Annotated[
        Address | None,
        Flag("ADDR", "Have the last machine bring results here [home dials it for them]."),
    ] = None
    mix_kernels: Annotated[
        bool, Flag(None, "Let machines compute with kernels that round differently.")
    ] = False
    verbose: VerboseFlag = False


class PushFlags(Settings):
    """Whose parts are sent."""

    manifest: ManifestFlag = DEFAULT_OUTPUT
    model_dir: Annotated[
        ModelDir | None,
        Flag("DIR|NAME", "To cut from what is no longer there [beside the manifest]."),
    ] = None
    verbose: VerboseFlag = False


class PartsFlags(Settings):
    """Of whose parts to hear, and which to remove."""

    manifest: ManifestFlag = DEFAULT_OUTPUT
    remove: Annotated[
        tuple[str, ...], Flag("PART", "Remove these; the hash's beginning.", is_by_hand=True)
    ] = ()
    remove_unused: Annotated[
        bool, Flag(None, "Remove what no stage there needs.", is_by_hand=True)
    ] = False
    verbose: VerboseFlag = False


def results_endpoint(home: Endpoint | None) -> TcpEndpoint | None:
    """Where results come in, if that is said. Raises InputError."""
    if home is not None and not isinstance(home, TcpEndpoint):
        raise InputError(f"--home {home}: write HOST:PORT")
    return home
