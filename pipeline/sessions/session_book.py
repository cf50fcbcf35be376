"""What home keeps of its sessions: the text, and which stored keys and values are of it.

A file for each, sealed under the client's secret, since it holds the user's text. Without it
nothing that stages have stored can be opened, or told from what was stored earlier: to forget a
session is to remove its file.
"""

import base64
import fcntl
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

import msgpack
import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pipeline.engine.stored_text import SlotStages
from pipeline.errors import InputError, SessionInUse, StateRefused, StoreError
from pipeline.files import is_file, write_atomically
from pipeline.protocol.stored_state import MAX_SAVED_CHUNKS, Mark, StoredPart, StoredSlot
from pipeline.sessions.sealing import CHUNK_POSITIONS
from pipeline.sessions.session_keys import SessionKeys

_NONCE_BYTES = 12
_SALT_BYTES = 32
_SUFFIX = ".session"


@dataclass(frozen=True, slots=True)
class Record:
    """A session as home knows it. `marks`: of each stage, the ends of its stored chunks."""

    owner: str
    name: str
    model: str
    core_hash: bytes
    salt: bytes
    epoch: int = 0
    token_ids: tuple[int, ...] = ()
    marks: tuple[tuple[Mark, ...], ...] = ()

    @property
    def num_stored(self) -> int:
        """Tokens of the text whose keys and values every stage has stored."""
        ends = {marks[-1].position if marks else 0 for marks in self.marks}
        return ends.pop() if len(ends) == 1 else 0


class SessionBook:
    """All sessions of one secret that run on one manifest's stages."""

    def __init__(
        self, directory: Path, keys: SessionKeys, model: str, core_hash: bytes, num_stages: int
    ) -> None:
        self._directory = directory
        self._keys = keys
        self._model = model
        self._core_hash = core_hash
        self._num_stages = num_stages
        # Saves of one session go one after another.
        self._saving = WeakValueDictionary[bytes, trio.Lock]()
        # Sessions that this process has: by which descriptor, and for how many; and those of them
        # that a request has, of which there is one.
        self._claims: dict[bytes, tuple[int, int]] = {}
        self._in_use = set[bytes]()

    def open(self, owner: str, name: str) -> "HomeSession":
        """The session that an owner calls by a name, new if there is none. Raises InputError."""
        if not name:
            raise InputError("the name of a session is empty")
        session_id = self._keys.session_id(owner, name)
        record = self.read(session_id)
        if record is not None and record.model != self._model:
            raise InputError(
                f"session {name!r} is of another model, {record.model}; "
                "take another name, or forget it"
            )
        if record is None:
            salt = os.urandom(_SALT_BYTES)
            record = Record(owner, name, self._model, self._core_hash, salt)
        if record.core_hash != self._core_hash or len(record.marks) != self._num_stages:
            # Cut otherwise than it was: its text is computed anew.
            none: tuple[tuple[Mark, ...], ...] = ((),) * self._num_stages
            record = replace(record, core_hash=self._core_hash, marks=none)
        return HomeSession(self, session_id, record)

    def forget(self, name: str) -> bool:
        """Remove the records of a name, of all its owners; whether there was one.

        Raises InputError, SessionInUse.
        """
        found = {self._keys.session_id("", name)}  # one's own even where it cannot be read
        for session_id in self._session_ids():
            with suppress(InputError):
                record = self.read(session_id)
                if record is not None and record.name == name:
                    found.add(session_id)
        return sum(self._remove(session_id, name) for session_id in sorted(found)) > 0

    def records(self) -> Iterator[Record | InputError]:
        """All sessions beside this secret; of one that cannot be read, why."""
        for session_id in self._session_ids():
            try:
                record = self.read(session_id)
            except InputError as error:
                yield error
            else:
                if record is not None:
                    yield record

    def _session_ids(self) -> Iterator[bytes]:
        for path in sorted(self._directory.glob("*" + _SUFFIX)):
            with suppress(ValueError):  # its name is none that a session is kept under
                yield bytes.fromhex(path.stem)

    def _remove(self, session_id: bytes, name: str) -> bool:
        path = self._path(session_id)
        if not is_file(path):
            return False
        try:
            with self.locked(session_id, name):  # else who has it would write it again
                path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise InputError(f"cannot remove {path}: {error.strerror}") from error
        return True

    def read(self, session_id: bytes) -> Record | None:
        """A session's record, if there is one. Raises InputError where it is of another secret."""
        path = self._path(session_id)
        if not is_file(path):
            return None
        try:
            sealed = base64.b64decode(path.read_bytes())
            cipher = AESGCM(self._keys.record_key(session_id))
            plain = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], session_id)
            found = msgpack.unpackb(plain, use_list=False)
            marks = tuple(tuple(Mark(*mark) for mark in each) for each in found.pop("marks"))
            return Record(**found, marks=marks)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except (InvalidTag, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is damaged, or of another secret; forget it") from error

    def write(self, session_id: bytes, record: Record) -> None:
        """Keep a session's record for good. Raises StoreError."""
        fields = {name: getattr(record, name) for name in Record.__slots__}
        plain: bytes = msgpack.packb(fields)
        nonce = os.urandom(_NONCE_BYTES)
        cipher = AESGCM(self._keys.record_key(session_id))
        sealed = nonce + cipher.encrypt(nonce, plain, session_id)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            text = base64.b64encode(sealed).decode()
            write_atomically(self._path(session_id), text, is_private=True)
            descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except (OSError, InputError) as error:
            raise StoreError(f"cannot keep the session: {error}") from error

    def stored(self, session_id: bytes, record: Record, counts: Sequence[int]) -> StoredSlot:
        """What stages are told of so many first chunks each."""
        parts = []
        for idx, (marks, count) in enumerate(zip(record.marks, counts, strict=True)):
            key = self._keys.stage_key(session_id, record.salt, self._core_hash, idx)
            parts.append(StoredPart(key, count, marks[count - 1] if count else Mark(0, b"")))
        return StoredSlot(session_id, record.epoch, parts)

    @contextmanager
    def locked(self, session_id: bytes, name: str) -> Iterator[None]:
        """One request alone has a session meanwhile. Raises InputError, SessionInUse."""
        if session_id in self._in_use:
            raise _in_use(name)
        with self._claimed(session_id, name):
            self._in_use.add(session_id)
            try:
                yield
            finally:
                self._in_use.remove(session_id)

    @contextmanager
    def _claimed(self, session_id: bytes, name: str) -> Iterator[None]:
        """This process alone has a session meanwhile. Raises InputError, SessionInUse."""
        descriptor, count = self._claims.get(session_id) or (self._claim(session_id, name), 0)
        self._claims[session_id] = descriptor, count + 1
        try:
            yield
        finally:
            _, count = self._claims.pop(session_id)
            if count > 1:
                self._claims[session_id] = descriptor, count - 1
            else:
                os.close(descriptor)

    def _claim(self, session_id: bytes, name: str) -> int:
        path = self._path(session_id).with_suffix(".lock")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise _in_use(name) from error
        return descriptor

    def saving(self, session_id: bytes) -> trio.Lock:
        """Whoever has this saves the session meanwhile."""
        return self._saving.setdefault(session_id, trio.Lock())

    def _path(self, session_id: bytes) -> Path:
        return self._directory / (session_id.hex() + _SUFFIX)

    async def save(
        self,
        session: "HomeSession",
        stages: SlotStages,
        slot: int,
        token_ids: tuple[int, ...],
        num_held: int,
    ) -> None:
        """See `HomeSession.save`; one after another, each going on from the one before."""
        session_id, owner, name = session.session_id, session.record.owner, session.record.name
        with self._claimed(session_id, name):
            async with self.saving(session_id):
                found = self.open(owner, name).record
                record = replace(found, epoch=found.epoch + 1)
                marks: tuple[tuple[Mark, ...], ...] = ((),) * self._num_stages
                if session.is_void:
                    record = replace(record, marks=marks)
                try:
                    marks = await self._store(session_id, record, stages, slot, token_ids, num_held)
                finally:  # the text is kept whatever becomes of its keys and values
                    self.write(session_id, replace(record, token_ids=token_ids, marks=marks))

    async def _store(
        self,
        session_id: bytes,
        record: Record,
        stages: SlotStages,
        slot: int,
        token_ids: tuple[int, ...],
        num_held: int,
    ) -> tuple[tuple[Mark, ...], ...]:
        """Write what is new; all of it where what it would go on from is gone."""
        common = 0
        for one, other in zip(record.token_ids, token_ids[:num_held], strict=False):
            if one != other:
                break
            common += 1
        kept = [sum(mark.position <= common for mark in marks) for marks in record.marks]
        for counts in (kept, [0] * len(kept)):
            stored = self.stored(session_id, record, counts)
            first = stored.parts[0].last.position
            end = min(num_held, first + MAX_SAVED_CHUNKS * CHUNK_POSITIONS)
            before = [each[:count] for each, count in zip(record.marks, counts, strict=True)]
            if first == end:
                return tuple(before)
            try:
                new = await stages.save(slot, end, stored)
            except StoreError:
                if not any(counts):
                    raise
                continue
            return tuple((*old, *marks) for old, marks in zip(before, new, strict=True))
        raise StoreError("stages have stored nothing")


class HomeSession:
    """One session, as the engine has it loaded and saved."""

    def __init__(self, book: SessionBook, session_id: bytes, record: Record) -> None:
        self.session_id = session_id
        self.record = record
        # What is stored has turned out not to be what was: nothing goes on from it.
        self.is_void = False
        self._book = book

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other request has it meanwhile. Raises InputError, SessionInUse."""
        with self._book.locked(self.session_id, self.record.name):
            self._read_again()
            yield

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """As `locked`, once what the request before it has left is saved."""
        with self._book.locked(self.session_id, self.record.name):
            async with self._book.saving(self.session_id):
                self._read_again()
            yield

    def _read_again(self) -> None:
        self.record = self._book.open(self.record.owner, self.record.name).record

    @property
    def stored_ids(self) -> tuple[int, ...]:
        """The tokens whose keys and values stages have stored."""
        return self.record.token_ids[: self.record.num_stored]

    async def load(self, stages: SlotStages, slot: int, length: int) -> None:
        """Put the first of them into a slot. Raises StateRefused, StoreError or StageLost."""
        counts = []
        for marks in self.record.marks:
            before = sum(mark.position < length for mark in marks)
            if before == len(marks):
                raise StateRefused(f"{length} tokens are not stored")
            counts.append(before + 1)
        try:
            await stages.load(slot, length, self._book.stored(self.session_id, self.record, counts))
        except StateRefused:
            self.is_void = True
            raise

    async def save(
        self, stages: SlotStages, slot: int, token_ids: tuple[int, ...], num_held: int
    ) -> None:
        """Keep a text, and the keys and values of what the slot holds. Raises StoreError."""
        try:
            await self._book.save(self, stages, slot, token_ids, num_held)
        except InputError as error:
            raise StoreError(f"cannot keep the session: {error}") from error


def _in_use(name: str) -> SessionInUse:
    return SessionInUse(f"session {name!r} is in use by another client; try again when it is done")
