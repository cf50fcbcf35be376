"""Fuzz every decoder of the transport that is fed by the network, with atheris.

Usage: python scripts/fuzz_transport.py [--runs N] [--seed N] [--decoder NAME ...]

Each decoder runs in a process of its own. Anything but a ProtocolError is a finding: the input is
printed and the exit code is 1.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["transport"]):
    from transport import frame_stream, handshake, noise, records, rekey_policy, tensor_frames
    from transport.attestation.evidence_binding import Binding
    from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
    from transport.errors import ProtocolError

from command_line import Parser, whole
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

Decoder = Callable[[bytes], None]
KEY = bytes(32)
LIMITS = tensor_frames.FrameLimits(max_header_bytes=4096, max_tensors=8, max_tensor_bytes=1 << 20)
POLICY = rekey_policy.RekeyPolicy(max_records=4)
LINK = handshake.Link(
    handshake.LinkKind.DATA,
    handshake.Role(handshake.RoleKind.STAGE, 0),
    handshake.Role(handshake.RoleKind.STAGE, 1),
    manifest_hash=bytes(32),
)


def make_cipher() -> noise.CipherState:
    return noise.CipherState(noise.AEADS["ChaChaPoly"], KEY)


def make_handshake_decoder() -> Decoder:
    """First byte: which phase. The rest: the message, as sent or XORed over a genuine one."""
    keys = [X25519PrivateKey.generate() for _ in range(2)]
    public = frozenset(key.public_key().public_bytes_raw() for key in keys)
    ours, theirs = (
        handshake.Credentials(key, KeyOnlyAttester(), (KeyOnlyVerifier(public),)) for key in keys
    )

    def decode(data: bytes) -> None:
        selector, mask = data[:1] or b"\0", data[1:]
        phase = selector[0] % 4
        awaiting_hello = handshake.respond(LINK, theirs)
        if phase == 0:
            awaiting_hello.receive(mask)
            return
        awaiting_reply, hello = handshake.initiate(LINK, ours)
        awaiting_proof, reply = awaiting_hello.receive(hello)
        if phase == 1:
            awaiting_reply.receive(overlay(reply, mask))
            return
        awaiting_accept, proof = awaiting_reply.receive(reply)
        if phase == 2:
            awaiting_proof.receive(overlay(proof, mask))
            return
        awaiting_accept.receive(overlay(awaiting_proof.receive(proof)[1], mask))

    return decode


def overlay(message: bytes, mask: bytes) -> bytes:
    mixed = bytes(a ^ b for a, b in zip(message, mask, strict=False))
    return mixed + message[len(mixed) :] + mask[len(message) :]


def make_evidence_decoder() -> Decoder:
    binding = Binding(b"stage/1", bytes(32), bytes(32), bytes(32))
    verifiers = (KeyOnlyVerifier(frozenset({bytes(32)})),)

    def decode(data: bytes) -> None:
        handshake.check_evidence_untrusted(data, verifiers, binding)

    return decode


def make_records_decoder() -> Decoder:
    """Raw bytes from the wire, cut into reads of the first byte's size."""

    def decode(data: bytes) -> None:
        reader = records.RecordReader(records.RecordOpener(make_cipher(), POLICY))
        step = 1 + data[0] if data else 1
        for start in range(1, len(data), step):
            piece = data[start : start + step]
            reader.space()[: len(piece)] = piece
            reader.wrote(len(piece))
            while (record := reader.ready_untrusted()) is not None:
                reader.open_into(memoryview(bytearray(record.plaintext_bytes)))

    return decode


def make_head_decoder() -> Decoder:
    def decode(data: bytes) -> None:
        tensor_frames.decode_layout_untrusted(memoryview(data), LIMITS)

    return decode


def make_frames_decoder() -> Decoder:
    """Authentic records of arbitrary kinds and plaintexts: kind byte, length byte, plaintext."""
    out = memoryview(bytearray(1024))

    def decode(data: bytes) -> None:
        sealer = records.RecordSealer(make_cipher(), POLICY)
        receiver = frame_stream.FrameReceiver(records.RecordOpener(make_cipher(), POLICY), LIMITS)
        while len(data) >= 2 and not receiver.is_ended:
            kind = records.RecordKind(1 + data[0] % 5)
            size = data[1] if kind in (frame_stream.FRAME, frame_stream.BODY) else 0
            plaintext, data = data[2 : 2 + size], data[2 + size :]
            sealed = out[: sealer.seal_into(kind, plaintext, out)]
            receiver.space()[: len(sealed)] = sealed
            receiver.wrote(len(sealed))
            receiver.next_frame_untrusted()

    return decode


DECODERS: dict[str, Callable[[], Decoder]] = {
    "handshake": make_handshake_decoder,
    "evidence": make_evidence_decoder,
    "records": make_records_decoder,
    "head": make_head_decoder,
    "frames": make_frames_decoder,
}


def fuzz(name: str, num_runs: int, seed: int) -> None:
    """Run one decoder in this process; libFuzzer ends it."""
    decode = DECODERS[name]()

    def run(data: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            decode(data)

    artifacts = f"-artifact_prefix={tempfile.gettempdir()}/"  # where a finding's input is kept
    options = [
        artifacts,
        f"-runs={num_runs}",
        f"-seed={seed}",
        "-max_len=600",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0"], run)
    atheris.Fuzz()


def main() -> int:
    parser = Parser(prog="fuzz_transport", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=whole(1), default=20_000, help="inputs per decoder")
    parser.add_argument("--seed", type=whole(0), default=1, help="of the mutations")
    parser.add_argument("--decoder", nargs="*", choices=DECODERS, default=list(DECODERS))
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        fuzz(options.decoder[0], options.runs, options.seed)
        return 0
    failed = []
    for name in options.decoder:
        command = [sys.executable, __file__, "--in-process", "--decoder", name]
        command += ["--runs", str(options.runs), "--seed", str(options.seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        executed = [line for line in done.stderr.split("\n") if "executed_units" in line]
        count = executed[0].split()[-1] if executed else "no"
        print(f"{name}: {count} inputs, {'failed' if done.returncode else 'protocol errors only'}")
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
