"""Channels from their private keys to the last byte, as transport/vectors.json has them.

`python -m tests.transport.wire_vectors` prints a fresh recording, under new keys.
"""

import hashlib
import json
from datetime import UTC, datetime
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from transport import noise
from transport.attestation.dev_authority import DevAttester, DevAuthority, dev_verifier
from transport.attestation.evidence_binding import EvidenceKind
from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
from transport.frame_stream import FrameReceiver, FrameSender
from transport.handshake import (
    VERSION,
    Credentials,
    Link,
    LinkKind,
    Role,
    RoleKind,
    initiate,
    respond,
)
from transport.records import RecordKind
from transport.rekey_policy import RekeyPolicy
from transport.tensor_frames import DType, Frame, FrameKind, FrameLimits, Tensor, TensorSpec

# Records of more bytes than this are told by their hash.
MOST_SHOWN = 4096
LIMITS = FrameLimits(max_header_bytes=64, max_tensors=3, max_tensor_bytes=1 << 20, check=None)
SIDES = ("initiator", "responder")
# Of each link that is recorded: what both ends show, and who begins.
LINKS = {
    "control": ("key-only", "orchestrator"),
    "data": ("dev", "stage/0"),
    "results": ("key-only", "orchestrator"),
}


def fresh(link):
    """What a recording begins with: a link, private keys, and an authority if need be."""
    evidence, initiator = LINKS[link]
    keys = {
        side: {
            name: X25519PrivateKey.generate().private_bytes_raw().hex()
            for name in ("static", "ephemeral")
        }
        for side in SIDES
    }
    has_epoch = link != "control"
    begun = {
        "evidence": evidence,
        "link": link,
        "initiator_role": initiator,
        "responder_role": "stage/1",
        "core_hash": hashlib.sha256(link.encode()).hexdigest(),
        "epoch": hashlib.sha256(b"epoch").digest()[:16].hex() if has_epoch else bytes(16).hex(),
        "private_keys": keys,
        "rekey_after_records": 3,
    }
    if evidence == "dev":
        now = datetime.now(UTC).replace(microsecond=0)
        authority = DevAuthority.create(now)
        pem = authority.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem += authority.root_cert.public_bytes(Encoding.PEM)
        begun |= {"authority_pem": pem.decode(), "clock": now.isoformat(), "documents": {}}
    return begun


def complete(begun):
    """All that follows from it: handshake, records, frames. Documents are signed where missing."""
    link = Link(
        LinkKind[begun["link"].upper()],
        _role(begun["initiator_role"]),
        _role(begun["responder_role"]),
        bytes.fromhex(begun["core_hash"]),
        bytes.fromhex(begun["epoch"]),
    )
    keys = {side: _keys(begun, side, "static") for side in SIDES}
    # An initiator makes its ephemeral key first.
    ephemeral = iter([_keys(begun, side, "ephemeral") for side in SIDES])
    policy = RekeyPolicy(max_records=begun["rekey_after_records"])
    documents = dict(begun.get("documents", {}))
    credentials = {
        side: Credentials(keys[side], _attester(begun, side, documents), _verifiers(begun, keys))
        for side in SIDES
    }
    with mock.patch.object(noise, "X25519PrivateKey") as generator:
        generator.generate.side_effect = lambda: next(ephemeral)
        waiting, hello = initiate(link, credentials["initiator"], policy)
        heard, reply = respond(link, credentials["responder"], policy).receive(hello).answer()
    awaiting, proof = waiting.receive(reply)
    server, accept = heard.receive(proof)
    client = awaiting.receive(accept)
    assert client.handshake_hash == server.handshake_hash
    done = {
        "prologue": link.prologue().hex(),
        "messages": [each.hex() for each in (hello, reply, proof, accept)],
        "handshake_hash": client.handshake_hash.hex(),
        "initiator_to_responder": _spoken(client.sealer, server.opener),
        "responder_to_initiator": _spoken(server.sealer, client.opener),
    }
    return begun | ({"documents": documents} if documents else {}) | done


def frames():
    """What each direction says: without tensors, inline, in bodies, and something after them.

    The last one's tensor is empty, and padded all the same.
    """
    yield Frame(FrameKind.CONTROL, b"a header")
    pair = (_tensor(DType.F32, (1, 5)), _tensor(DType.U32, (3,)))
    yield Frame(FrameKind.DATA, b"two tensors", pair)
    yield Frame(FrameKind.DATA, b"", (_tensor(DType.U8, (300_000,)), _tensor(DType.I8, (0, 7))))
    yield Frame(FrameKind.CONTROL, b"")
    yield Frame(FrameKind.DATA, b"no element", (_tensor(DType.U32, (0,)),))


def told_frames():
    """The frames as the recording tells them; byte i of a tensor is i modulo 251."""
    return [
        {
            "kind": frame.kind.name,
            "header": frame.header.hex(),
            "tensors": [{"dtype": t.spec.dtype.name, "shape": t.spec.shape} for t in frame.tensors],
        }
        for frame in frames()
    ]


def _spoken(sealer, opener):
    """Each record's kind and bytes, of all frames and the close; what is opened is compared."""
    sender, receiver = FrameSender(sealer), FrameReceiver(opener, LIMITS)
    records = []
    for frame in frames():
        first, pieces = sender.begin(frame)
        said = bytes(first) + b"".join(bytes(sender.seal_piece(piece)) for piece in pieces)
        records += _split(said)
        assert _heard(receiver, memoryview(said)) == _plain(frame)
    return [_told(record) for record in (*records, *_split(bytes(sender.close())))]


def _heard(receiver, said):
    while (frame := receiver.next_frame_untrusted()) is None:
        space = receiver.space()
        size = min(len(space), len(said))
        space[:size] = said[:size]
        receiver.wrote(size)
        said = said[size:]
    return _plain(frame)


def _plain(frame):
    return frame.kind, frame.header, [(each.spec, bytes(each.data)) for each in frame.tensors]


def _split(said):
    while said:
        size = 8 + int.from_bytes(said[4:8])
        yield said[:size]
        said = said[size:]


def _told(record):
    kind = {"kind": RecordKind(record[0]).name}
    if len(record) <= MOST_SHOWN:
        return kind | {"bytes": record.hex()}
    return kind | {"num_bytes": len(record), "sha256": hashlib.sha256(record).hexdigest()}


def _tensor(dtype, shape):
    """Byte i is i modulo 251."""
    spec = TensorSpec(dtype, shape)
    return Tensor(spec, memoryview(bytes(i % 251 for i in range(spec.nbytes))))


def _role(name):
    kind, _, idx = name.partition("/")
    return Role(RoleKind[kind.upper()], int(idx or 0))


def _keys(begun, side, name):
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(begun["private_keys"][side][name]))


class _Recorded:
    """Shows the recorded document: its signature is random, so that no two are the same."""

    kind = EvidenceKind.DEV

    def __init__(self, side, documents, attester):
        self.side, self.documents, self.attester = side, documents, attester

    def attest(self, binding):
        if self.side not in self.documents:
            self.documents[self.side] = self.attester.attest(binding).hex()
        return bytes.fromhex(self.documents[self.side])


def _attester(begun, side, documents):
    if begun["evidence"] == "key-only":
        return KeyOnlyAttester()
    now = datetime.fromisoformat(begun["clock"])
    pcrs = {0: bytes([side == "initiator"] * 48)}
    return _Recorded(side, documents, DevAttester(_authority(begun), pcrs, clock=lambda: now))


def _verifiers(begun, keys):
    if begun["evidence"] == "key-only":
        allowed = frozenset(each.public_key().public_bytes_raw() for each in keys.values())
        return (KeyOnlyVerifier(allowed),)
    now = datetime.fromisoformat(begun["clock"])
    return (dev_verifier(_authority(begun).root_cert, None, clock=lambda: now),)


def _authority(begun):
    pem = begun["authority_pem"].encode()
    return DevAuthority(x509.load_pem_x509_certificate(pem), load_pem_private_key(pem, None))


if __name__ == "__main__":
    recorded = [complete(fresh(link)) for link in LINKS]
    told = {"version": VERSION.decode(), "frames": told_frames(), "channels": recorded}
    print(json.dumps(told, indent=1))
