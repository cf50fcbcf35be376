"""Noise Protocol Framework, revision 34, over X25519: handshake patterns as data.

Source: https://noiseprotocol.org/noise.html. The class and method names are the specification's.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from transport.cipher import AEADS, KEY_BYTES, TAG_BYTES, Buffer, CipherState
from transport.errors import HandshakeError, MisuseError
from transport.frozen import frozen

DH_BYTES = 32
MAX_MESSAGE_BYTES = 65_535
HASHES = {"SHA256": "sha256", "SHA512": "sha512", "BLAKE2s": "blake2s", "BLAKE2b": "blake2b"}


@frozen
class Pattern:
    """A handshake pattern: public keys known beforehand, then the tokens of each message."""

    initiator_known: tuple[str, ...]
    responder_known: tuple[str, ...]
    messages: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, notation: str) -> Self:
        """Read the specification's notation: `-> e`, `<- e, ee`; `...` ends the pre-messages."""
        known: dict[str, tuple[str, ...]] = {"->": (), "<-": ()}
        before, dots, after = notation.rpartition("...")
        for line in before.split("\n") if dots else ():
            if line.strip():
                arrow, _, tokens = line.strip().partition(" ")
                known[arrow] = tuple(tokens.split(", "))
        messages = (tuple(line.strip()[3:].split(", ")) for line in after.strip().split("\n"))
        return cls(known["->"], known["<-"], tuple(messages))

    def with_psk(self, *positions: int) -> Pattern:
        """Return the pattern with the modifiers `psk<position>` applied."""
        messages = list(self.messages)
        for position in positions:
            if position == 0:
                messages[0] = ("psk", *messages[0])
            else:
                messages[position - 1] = (*messages[position - 1], "psk")
        return Pattern(self.initiator_known, self.responder_known, tuple(messages))

    @property
    def uses_psk(self) -> bool:
        """Whether any message mixes in a pre-shared key."""
        return any("psk" in tokens for tokens in self.messages)


XX = Pattern.parse("-> e\n<- e, ee, s, es\n-> s, se")


class SymmetricState:
    """The chaining key, the transcript hash `h`, and the key derived so far."""

    def __init__(self, protocol_name: str) -> None:
        *_, aead, hash_name = protocol_name.split("_")
        self._aead = AEADS[aead]
        self._digest = HASHES[hash_name]
        self._hash_bytes = hashlib.new(self._digest).digest_size
        name = protocol_name.encode()
        if len(name) <= self._hash_bytes:
            self.h = name.ljust(self._hash_bytes, b"\0")
        else:
            self.h = hashlib.new(self._digest, name).digest()
        self._chaining_key = self.h
        self._cipher: CipherState | None = None

    @property
    def has_key(self) -> bool:
        """Whether payloads and static keys are encrypted by now."""
        return self._cipher is not None

    def mix_hash(self, data: Buffer) -> None:
        """Bind `data` into the transcript."""
        self.h = hashlib.new(self._digest, self.h + data).digest()

    def mix_key(self, material: bytes) -> None:
        """Derive the next key from a Diffie-Hellman result."""
        self._chaining_key, key = self._hkdf(material, 2)
        self._cipher = CipherState(self._aead, key[:KEY_BYTES])

    def mix_key_and_hash(self, psk: bytes) -> None:
        """Derive the next key from a pre-shared key, and bind it into the transcript."""
        self._chaining_key, mixed, key = self._hkdf(psk, 3)
        self.mix_hash(mixed)
        self._cipher = CipherState(self._aead, key[:KEY_BYTES])

    def encrypt_and_hash(self, plaintext: Buffer) -> bytes:
        """Encrypt under the current key, if there is one, and bind the result."""
        sealed = self._cipher.encrypt(self.h, plaintext) if self._cipher else bytes(plaintext)
        self.mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: Buffer) -> bytes:
        """Undo `encrypt_and_hash`. Raises: HandshakeError."""
        try:
            plaintext = self._cipher.decrypt(self.h, sealed) if self._cipher else bytes(sealed)
        except InvalidTag as error:
            raise HandshakeError("a handshake message does not authenticate") from error
        self.mix_hash(sealed)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """Return the transport ciphers: initiator to responder, and back."""
        first, second = self._hkdf(b"", 2)
        return (
            CipherState(self._aead, first[:KEY_BYTES]),
            CipherState(self._aead, second[:KEY_BYTES]),
        )

    def _hkdf(self, material: bytes, num_outputs: int) -> list[bytes]:
        secret = hmac.digest(self._chaining_key, material, self._digest)
        outputs = [b""]
        for index in range(1, num_outputs + 1):
            outputs.append(hmac.digest(secret, outputs[-1] + bytes([index]), self._digest))
        return outputs[1:]


class HandshakeState:
    """One side of one handshake.

    A message is its tokens, then its payload; between the two `handshake_hash` already covers
    the keys exchanged, which is what the payload may have to speak about.
    """

    def __init__(
        self,
        protocol_name: str,
        pattern: Pattern,
        *,
        is_initiator: bool,
        prologue: bytes = b"",
        static: X25519PrivateKey | None = None,
        remote_static: bytes | None = None,
        psks: tuple[bytes, ...] = (),
        ephemeral: X25519PrivateKey | None = None,
    ) -> None:
        """`ephemeral` is for published vectors only: left out, it is made fresh when sent."""
        self._symmetric = SymmetricState(protocol_name)
        self._pattern = pattern
        self._is_initiator = is_initiator
        self._private = {"s": static, "e": ephemeral}
        self._remote = {"s": remote_static, "e": None}
        self._psks = list(psks)
        self._position = 0
        self._symmetric.mix_hash(prologue)
        for known, is_own in (
            (pattern.initiator_known, is_initiator),
            (pattern.responder_known, not is_initiator),
        ):
            for token in known:
                self._symmetric.mix_hash(
                    self.public_key(token) if is_own else self.remote_key(token)
                )

    @property
    def handshake_hash(self) -> bytes:
        """The transcript hash `h` at this point."""
        return self._symmetric.h

    @property
    def is_finished(self) -> bool:
        """Whether every message of the pattern has been exchanged."""
        return self._position == len(self._pattern.messages)

    def public_key(self, token: str) -> bytes:
        """Return our own static (`s`) or ephemeral (`e`) public key. Raises: MisuseError."""
        return self._own(token).public_key().public_bytes_raw()

    def remote_key(self, token: str) -> bytes:
        """Return the peer's static (`s`) or ephemeral (`e`) public key. Raises: MisuseError."""
        key = self._remote[token]
        if key is None:
            raise MisuseError(f"the peer's key {token!r} is not known at this point")
        return key

    def write_message(self, payload: Buffer) -> bytes:
        """Return the next message. Raises: as `write_tokens`."""
        return self.write_tokens() + self.write_payload(payload)

    def read_message(self, message: Buffer) -> bytes:
        """Take the peer's next message and return its payload. Raises: HandshakeError."""
        return self.read_payload(self.read_tokens(message))

    def write_tokens(self) -> bytes:
        """Return the key part of the next message.

        Raises: HandshakeError on a peer's key of low order, MisuseError out of turn.
        """
        parts = []
        for token in self._tokens(is_writing=True):
            match token:
                case "e":
                    self._private["e"] = self._private["e"] or X25519PrivateKey.generate()
                    parts.append(self.public_key("e"))
                    self._mix_ephemeral(parts[-1])
                case "s":
                    parts.append(self._symmetric.encrypt_and_hash(self.public_key("s")))
                case _:
                    self._mix_secret(token)
        return b"".join(parts)

    def write_payload(self, payload: Buffer) -> bytes:
        """Return the payload part of the message whose tokens were written."""
        self._position += 1
        return self._symmetric.encrypt_and_hash(payload)

    def read_tokens(self, message: Buffer) -> memoryview:
        """Take the key part of a message and return the rest.

        Raises: HandshakeError, MisuseError out of turn.
        """
        rest = memoryview(message)
        for token in self._tokens(is_writing=False):
            match token:
                case "e":
                    key, rest = _take(rest, DH_BYTES)
                    self._remote["e"] = bytes(key)
                    self._mix_ephemeral(bytes(key))
                case "s":
                    tag_bytes = TAG_BYTES if self._symmetric.has_key else 0
                    key, rest = _take(rest, DH_BYTES + tag_bytes)
                    self._remote["s"] = self._symmetric.decrypt_and_hash(key)
                case _:
                    self._mix_secret(token)
        return rest

    def read_payload(self, rest: Buffer) -> bytes:
        """Return the payload of the message whose tokens were read. Raises: HandshakeError."""
        payload = self._symmetric.decrypt_and_hash(rest)
        self._position += 1
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """Return the transport ciphers (sending, receiving). Raises: MisuseError before the end."""
        if not self.is_finished:
            raise MisuseError("the handshake is not finished")
        first, second = self._symmetric.split()
        return (first, second) if self._is_initiator else (second, first)

    def _tokens(self, *, is_writing: bool) -> tuple[str, ...]:
        is_own_turn = (self._position % 2 == 0) == self._is_initiator
        if self.is_finished or is_own_turn != is_writing:
            raise MisuseError("this message is the other side's, or the handshake is finished")
        return self._pattern.messages[self._position]

    def _own(self, token: str) -> X25519PrivateKey:
        key = self._private[token]
        if key is None:
            raise MisuseError(f"the pattern needs our own key {token!r}")
        return key

    def _mix_ephemeral(self, public_key: bytes) -> None:
        self._symmetric.mix_hash(public_key)
        if self._pattern.uses_psk:
            self._symmetric.mix_key(public_key)

    def _mix_secret(self, token: str) -> None:
        match token:
            case "psk":
                self._symmetric.mix_key_and_hash(self._psks.pop(0))
                return
            case _:  # the first letter is the initiator's key, the second the responder's
                own, remote = tuple(token if self._is_initiator else reversed(token))
        try:
            peer = X25519PublicKey.from_public_bytes(self.remote_key(remote))
            shared = self._own(own).exchange(peer)
        except ValueError as error:
            # A low-order point gives an all-zero secret, which everybody knows.
            raise HandshakeError("the peer's public key has low order") from error
        self._symmetric.mix_key(shared)


def _take(buffer: memoryview, num_bytes: int) -> tuple[memoryview, memoryview]:
    if len(buffer) < num_bytes:
        raise HandshakeError(f"a handshake message ends {num_bytes - len(buffer)} bytes early")
    return buffer[:num_bytes], buffer[num_bytes:]
