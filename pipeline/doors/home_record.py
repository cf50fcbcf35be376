"""What a client's machine remembers of a session, so that a later run goes on from it.

The tokens that a door has stored keys and values of, and the mark of these: sealed under the
session's own secret, for they are the user's text.
"""

import logging
import os
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pipeline.doors.bodies import NONCE_BYTES
from pipeline.doors.door_session import SessionName
from pipeline.doors.grants import DOMAIN, derive
from pipeline.doors.kept_state import MARK_BYTES, KeptMark, parse_mark
from pipeline.errors import MessageError
from pipeline.files import write_atomically

logger = logging.getLogger(__name__)

# A token has four bytes, and a third more as base64: far beyond any context.
_MAX_RECORD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Remembered:
    """Tokens, and the mark of a door's store that is behind the last of them."""

    token_ids: tuple[int, ...]
    mark: KeptMark


class HomeRecord:
    """A file of its owner's alone, which only the session's secret opens."""

    def __init__(self, path: Path, name: SessionName, core_hash: bytes) -> None:
        self._path = path
        self._key = AESGCM(derive(name.owner, b"record"))
        self._aad = DOMAIN + b" record" + core_hash

    def load(self) -> Remembered | None:
        """What was remembered; nothing where that is no longer to be read."""
        try:
            with self._path.open("rb") as file:
                sealed = b64decode(file.read(_MAX_RECORD_BYTES), validate=True)
            plain = self._key.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], self._aad)
            mark = parse_mark(plain[:MARK_BYTES])
        except FileNotFoundError:
            return None
        except (OSError, Base64Error, ValueError, InvalidTag, MessageError):
            # Of another model, or damaged: all of it can be sent again.
            logger.warning("event=session_record_unusable path=%s", self._path)
            return None
        token_ids = tuple(np.frombuffer(plain[MARK_BYTES:], "<u4").tolist())
        if mark is None or len(token_ids) != mark.mark.position:
            return None
        return Remembered(token_ids, mark)

    def save(self, remembered: Remembered | None) -> None:
        """Remember this instead. Raises InputError."""
        if remembered is None:
            self._path.unlink(missing_ok=True)
            return
        nonce = os.urandom(NONCE_BYTES)
        plain = remembered.mark.pack() + np.array(remembered.token_ids, "<u4").tobytes()
        sealed = nonce + self._key.encrypt(nonce, plain, self._aad)
        write_atomically(self._path, b64encode(sealed).decode(), is_private=True)
