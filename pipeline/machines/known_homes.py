"""Whom a machine obeys: the keys of orchestrators that were joined here, in a file of its owner's.

Attack: a key that another user writes into it. So the file is read as private keys are.
"""

import re
from pathlib import Path

from pipeline.errors import InputError, PolicyError
from pipeline.files import write_atomically
from transport.errors import MisuseError
from transport.private_files import read_private

FILE = "homes"
_HEADER = (
    "# Orchestrators that this machine obeys, a key a line.\n"
    "# To forget one, remove its line and start `stage-worker serve` again.\n"
)


class KnownHomes:
    """The orchestrators' keys; reading and writing go to the file each time."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE

    def keys(self) -> tuple[bytes, ...]:
        """All of them. Raises InputError, PolicyError where others may change the file."""
        try:
            text = read_private(self._path).decode("ascii", "replace")
        except FileNotFoundError:
            return ()
        except MisuseError as error:
            raise PolicyError(f"the list of orchestrators {error}") from error
        except OSError as error:
            raise InputError(f"cannot read {self._path}: {error.strerror}") from error
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        for line in lines:
            if not re.fullmatch(r"[0-9a-f]{64}", line):
                raise InputError(f"{self._path}: {line[:80]!r} is no key, 64 hexadecimal digits")
        return tuple(map(bytes.fromhex, lines))

    def add(self, key: bytes) -> None:
        """Obey this one too. Raises as `keys`."""
        keys = self.keys()
        if key not in keys:
            lines = [each.hex() + "\n" for each in (*keys, key)]
            write_atomically(self._path, _HEADER + "".join(lines), is_private=True)
