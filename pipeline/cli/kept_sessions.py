"""Sessions that outlive a command: which one, and what home keeps of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import model_validator

from pipeline.agreement.manifest import Manifest
from pipeline.cli.settings import Flag, Settings
from pipeline.errors import InputError, PolicyError
from pipeline.protocol.tide_window import TideWindow
from transport.errors import MisuseError
from transport.private_files import create_private, read_private

if TYPE_CHECKING:  # nothing of it is needed where no session is named
    from pipeline.sessions.session_book import HomeSession, SessionBook

SecretFlag = Annotated[
    Path | None, Flag("FILE", "Secret that sessions are sealed under; made if need be.")
]


class SessionFlags(Settings):
    """Which session a text goes on from, and becomes."""

    session: Annotated[str | None, Flag("NAME", "Go on where this session ended.")] = None
    secret_file: SecretFlag = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.session is not None and self.secret_file is None:
            raise InputError("--session needs --secret-file: a name, and what makes it yours")
        return self

    @contextmanager
    def opened(
        self, manifest: Manifest, window: TideWindow | None
    ) -> "Iterator[HomeSession | None]":
        """The session, if one is named; nobody else has it meanwhile. Raises InputError."""
        if self.session is None or self.secret_file is None:
            yield None
            return
        session = session_book(self.secret_file, manifest, window).open("", self.session)
        with session.locked():
            yield session


def session_book(
    path: Path, manifest: Manifest, window: TideWindow | None = None, *, is_made: bool = True
) -> "SessionBook":
    """The sessions of a secret, which is made if there is none, or not. Raises InputError."""
    from pipeline.sessions.session_book import SessionBook
    from pipeline.sessions.session_keys import SessionKeys

    if manifest.dp is not None:
        raise InputError("--secret-file: rows are noisy, and what noise was in is not kept")
    if window is not None:
        raise InputError("--secret-file: under a --window rows go that a session would need")
    try:
        if is_made and not path.exists():
            create_private(path, SessionKeys.new_secret())
        keys = SessionKeys(read_private(path))
    except MisuseError as error:
        raise PolicyError(f"--secret-file: {error}") from error
    except OSError as error:
        raise InputError(f"--secret-file: cannot use {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--secret-file {path}: {error}") from error
    directory = path.with_name(path.name + ".sessions")
    core, num_stages = manifest.core_hash(), len(manifest.stages)
    return SessionBook(directory, keys, manifest.model_name, core, num_stages)
