"""Which version of this is installed, for every command to say."""

import sys


def tell_version(command: str) -> None:
    """Print it and end, if `--version` is all that is asked."""
    if sys.argv[1:] != ["--version"]:
        return
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 (takes long)

    try:
        print(command, version("veilpipe"))  # noqa: T201
    except PackageNotFoundError:  # as in an image, which has the code alone
        print(command, "of no installed version")  # noqa: T201
    sys.exit()
