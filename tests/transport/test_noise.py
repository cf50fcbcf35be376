"""The Noise core against published vectors, an independent implementation, and bad input."""

import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from transport import noise
from transport.errors import HandshakeError, MisuseError

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "noise"

# The specification's patterns (sections 7.4, 7.5 and 18.1), in its own notation.
ONE_WAY = {"N": "<- s\n...\n-> e, es", "K": "-> s\n<- s\n...\n-> e, es, ss"}
ONE_WAY["X"] = "<- s\n...\n-> e, es, s, ss"
INTERACTIVE = """
NN: -> e | <- e, ee
NK: <- s ... -> e, es | <- e, ee
NX: -> e | <- e, ee, s, es
XN: -> e | <- e, ee | -> s, se
XK: <- s ... -> e, es | <- e, ee | -> s, se
XX: -> e | <- e, ee, s, es | -> s, se
KN: -> s ... -> e | <- e, ee, se
KK: -> s | <- s ... -> e, es, ss | <- e, ee, se
KX: -> s ... -> e | <- e, ee, se, s, es
IN: -> e, s | <- e, ee, se
IK: <- s ... -> e, es, s, ss | <- e, ee, se
IX: -> e, s | <- e, ee, se, s, es
NK1: <- s ... -> e | <- e, ee, es
NX1: -> e | <- e, ee, s | -> es
X1N: -> e | <- e, ee | -> s | <- se
X1K: <- s ... -> e, es | <- e, ee | -> s | <- se
XK1: <- s ... -> e | <- e, ee, es | -> s, se
X1K1: <- s ... -> e | <- e, ee, es | -> s | <- se
X1X: -> e | <- e, ee, s, es | -> s | <- se
XX1: -> e | <- e, ee, s | -> es, s, se
X1X1: -> e | <- e, ee, s | -> es, s | <- se
K1N: -> s ... -> e | <- e, ee | -> se
K1K: -> s | <- s ... -> e, es | <- e, ee | -> se
KK1: -> s | <- s ... -> e | <- e, ee, se, es
K1K1: -> s | <- s ... -> e | <- e, ee, es | -> se
K1X: -> s ... -> e | <- e, ee, s, es | -> se
KX1: -> s ... -> e | <- e, ee, se, s | -> es
K1X1: -> s ... -> e | <- e, ee, s | -> se, es
I1N: -> e, s | <- e, ee | -> se
I1K: <- s ... -> e, es, s | <- e, ee | -> se
IK1: <- s ... -> e, s | <- e, ee, se, es
I1K1: <- s ... -> e, s | <- e, ee, es | -> se
I1X: -> e, s | <- e, ee, s, es | -> se
IX1: -> e, s | <- e, ee, se, s | -> es
I1X1: -> e, s | <- e, ee, s | -> se, es
"""
PATTERNS = {name: noise.Pattern.parse(text) for name, text in ONE_WAY.items()} | {
    name: noise.Pattern.parse(text.replace(" | ", "\n").replace(" ... ", "\n...\n"))
    for name, _, text in (line.partition(": ") for line in INTERACTIVE.strip().split("\n"))
}
# Small-order points of Curve25519: the all-zero secret for every private key.
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


def load_vectors(name):
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    vectors = json.loads(path.read_text())["vectors"]
    return [v for v in vectors if v["protocol_name"].split("_")[2] == "25519"]


def pattern_of(protocol_name):
    base, modifiers = re.fullmatch(r"([A-Z0-9]+)(.*)", protocol_name.split("_")[1]).groups()
    return PATTERNS[base].with_psk(*(int(digit) for digit in re.findall(r"psk(\d)", modifiers)))


def private_key(hex_key):
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(hex_key)) if hex_key else None


def side(vector, prefix):
    remote = vector.get(f"{prefix}_remote_static")
    return noise.HandshakeState(
        vector["protocol_name"],
        pattern_of(vector["protocol_name"]),
        is_initiator=prefix == "init",
        prologue=bytes.fromhex(vector[f"{prefix}_prologue"]),
        static=private_key(vector.get(f"{prefix}_static")),
        ephemeral=private_key(vector.get(f"{prefix}_ephemeral")),
        remote_static=bytes.fromhex(remote) if remote else None,
        psks=tuple(bytes.fromhex(psk) for psk in vector.get(f"{prefix}_psks", ())),
    )


def run_vector(vector):
    writer, reader = side(vector, "init"), side(vector, "resp")
    is_one_way = len(pattern_of(vector["protocol_name"]).messages) == 1
    messages = iter(vector["messages"])
    while not writer.is_finished:
        message = next(messages)
        sealed = writer.write_message(bytes.fromhex(message["payload"]))
        assert sealed.hex() == message["ciphertext"]
        assert reader.read_message(sealed).hex() == message["payload"]
        writer, reader = reader, writer
    assert writer.handshake_hash == reader.handshake_hash
    if "handshake_hash" in vector:
        assert writer.handshake_hash.hex() == vector["handshake_hash"]
    (send, receive), (peer_send, peer_receive) = writer.split(), reader.split()
    if is_one_way:
        send, peer_receive = peer_send, receive
    for message in messages:
        sealed = send.encrypt(b"", bytes.fromhex(message["payload"]))
        assert sealed.hex() == message["ciphertext"]
        assert peer_receive.decrypt(b"", sealed).hex() == message["payload"]
        if not is_one_way:
            send, receive, peer_send, peer_receive = peer_send, peer_receive, send, receive


@pytest.mark.parametrize(("name", "num_expected"), [("cacophony.json", 472), ("snow.json", 408)])
def test_every_published_25519_vector_is_reproduced(name, num_expected):
    vectors = load_vectors(name)
    assert len(vectors) == num_expected
    for vector in vectors:
        run_vector(vector)


INTEROP_NAMES = [
    f"Noise_{pattern}_25519_{aead}_{digest}"
    for pattern, aead, digest in itertools.product(
        ["XX", "IK", "NN"], ["ChaChaPoly", "AESGCM"], ["SHA256", "SHA512", "BLAKE2s", "BLAKE2b"]
    )
]


@pytest.mark.parametrize("is_initiator", [True, False])
@pytest.mark.parametrize("protocol_name", INTEROP_NAMES)
def test_handshake_and_messages_interoperate_with_noiseprotocol(protocol_name, is_initiator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own deprecations are not ours to fix
        from noise.connection import Keypair, NoiseConnection

        ours_static, theirs_static = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        knows_responder = protocol_name.startswith("Noise_IK")
        theirs = NoiseConnection.from_name(protocol_name.encode())
        theirs.set_prologue(b"prologue")
        theirs.set_keypair_from_private_bytes(Keypair.STATIC, theirs_static.private_bytes_raw())
        theirs.set_as_responder() if is_initiator else theirs.set_as_initiator()
        if knows_responder and not is_initiator:
            theirs.set_keypair_from_public_bytes(
                Keypair.REMOTE_STATIC, ours_static.public_key().public_bytes_raw()
            )
        theirs.start_handshake()
    ours = noise.HandshakeState(
        protocol_name,
        PATTERNS[protocol_name.split("_")[1]],
        is_initiator=is_initiator,
        prologue=b"prologue",
        static=ours_static,
        remote_static=(
            theirs_static.public_key().public_bytes_raw()
            if knows_responder and is_initiator
            else None
        ),
    )
    is_our_turn = is_initiator
    while not ours.is_finished:
        if is_our_turn:
            assert theirs.read_message(ours.write_message(b"from us")) == b"from us"
        else:
            assert ours.read_message(bytes(theirs.write_message(b"from them"))) == b"from them"
        is_our_turn = not is_our_turn
    send, receive = ours.split()
    assert ours.handshake_hash == theirs.get_handshake_hash()
    for _ in range(3):
        assert theirs.decrypt(send.encrypt(b"", b"ping")) == b"ping"
        assert receive.decrypt(b"", theirs.encrypt(b"pong")) == b"pong"
    theirs.rekey_inbound_cipher()
    send.rekey()
    assert theirs.decrypt(send.encrypt(b"", b"after rekey")) == b"after rekey"


def make_pair():
    name = "Noise_XX_25519_ChaChaPoly_SHA256"
    return tuple(
        noise.HandshakeState(name, noise.XX, is_initiator=first, static=X25519PrivateKey.generate())
        for first in (True, False)
    )


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_low_order_ephemeral_key_is_refused(point):
    _, responder = make_pair()
    responder.read_message(point)
    with pytest.raises(HandshakeError, match="low order"):
        responder.write_message(b"")


def test_messages_out_of_turn_are_misuse():
    initiator, responder = make_pair()
    with pytest.raises(MisuseError):
        responder.write_message(b"")
    with pytest.raises(MisuseError):
        initiator.read_message(bytes(32))
    with pytest.raises(MisuseError):
        initiator.split()
