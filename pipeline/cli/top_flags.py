"""The flags of watching a server."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.cli.settings import Finite, Flag, Settings


class TopFlags(Settings):
    """Which server to watch, and how often to look."""

    url: Annotated[str, Flag("URL", "The server.", older=("INFEMERAL_CLIENT_SERVER_URL",))] = (
        "http://127.0.0.1:8000"
    )
    api_key_file: Annotated[Path | None, Flag("FILE", "A key the server accepts.")] = None
    interval: Annotated[Finite, Field(ge=0.1, le=86400), Flag("SECONDS", "Between two looks.")] = (
        1.0
    )
    once: Annotated[bool, Flag(None, "Print one snapshot.")] = False
