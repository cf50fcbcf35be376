"""Which version of this software runs here."""

from importlib.metadata import PackageNotFoundError, version


def software_version() -> str:
    """As the installation names it; "unknown" where there is none, as beside bare sources."""
    try:
        return version("veilpipe")
    except PackageNotFoundError:
        return "unknown"
