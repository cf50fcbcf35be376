"""Machines that have been joined and are in no manifest yet: what came after may have failed.

Their lines are used up by then. So they are kept beside the manifest's file, by address and key,
and the next `join` counts them in.
"""

from pathlib import Path

from pipeline.errors import InputError
from pipeline.files import write_atomically
from pipeline.machines.offer_line import is_place
from pipeline.machines.visitor import Address
from transport.dial_and_listen import parse_endpoint
from transport.errors import EndpointError


class Newcomers:
    """Those for one manifest; reading and writing go to the file each time."""

    def __init__(self, manifest: Path) -> None:
        self._path = manifest.with_suffix(".joined")

    def read(self) -> list[Address]:
        """All of them. Raises InputError."""
        try:
            return [_parse(line) for line in self._path.read_text("ascii").splitlines()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"cannot read {self._path}: {error.strerror}") from error
        except (ValueError, EndpointError) as error:
            raise InputError(
                f"{self._path} is no list of machines; remove it, and join them again"
            ) from error

    def add(self, address: Address) -> None:
        """Count this one in, instead of what was at its place. Raises InputError."""
        kept = [each for each in self.read() if each.endpoint != address.endpoint]
        lines = [f"{each.host_port} {each.key.hex()}\n" for each in (*kept, address)]
        write_atomically(self._path, "".join(lines))

    def clear(self) -> None:
        """They are in the manifest now."""
        self._path.unlink(missing_ok=True)


def _parse(line: str) -> Address:
    where, key = line.split()
    endpoint = parse_endpoint(where)
    if not is_place(endpoint) or len(bytes.fromhex(key)) != 32:
        raise ValueError(line)
    return Address(endpoint, bytes.fromhex(key))
