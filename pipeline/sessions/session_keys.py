"""From a client's secret to what names and seals its sessions."""

import secrets
from collections.abc import Sequence

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.protocol.stored_state import KEY_BYTES

MIN_SECRET_BYTES = 32
_DOMAIN = b"veilpipe session keys/1"


class SessionKeys:
    """Keys of everything that one secret protects, each for one use."""

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError for a secret that is too short."""
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(
                f"the secret has {len(secret)} bytes; it needs at least {MIN_SECRET_BYTES}"
            )
        self._secret = secret

    @staticmethod
    def new_secret() -> bytes:
        """A secret that nobody has."""
        return secrets.token_bytes(MIN_SECRET_BYTES)

    def session_id(self, owner: str, name: str) -> bytes:
        """32 bytes for the session that an owner, as an API key, calls by a name.

        Keyed, so that nobody can try names; and never a path, whatever the name is.
        """
        return self._derive(b"id", (owner.encode(), name.encode()))

    def record_key(self, session_id: bytes) -> bytes:
        """What home's own record of a session is sealed with: it has the user's text."""
        return self._derive(b"record", (session_id,))

    def stage_key(self, session_id: bytes, salt: bytes, core_hash: bytes, stage_idx: int) -> bytes:
        """What a stage seals with: it tells nothing of another stage's, or of another session's.

        `salt`: random, of home's record alone. Without it nothing that is stored can be opened.
        """
        return self._derive(b"stage %d" % stage_idx, (session_id, core_hash), salt)

    def _derive(self, purpose: bytes, parts: Sequence[bytes], salt: bytes | None = None) -> bytes:
        info = b"".join(
            len(part).to_bytes(4, "little") + part for part in (_DOMAIN, purpose, *parts)
        )
        return HKDF(SHA256(), KEY_BYTES, salt, info).derive(self._secret)
