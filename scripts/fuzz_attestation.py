"""Fuzzes what reads attestation evidence: nothing but protocol errors may come out.

    python scripts/fuzz_attestation.py [--runs N] [TARGET ...]

Needs the `fuzz` extra. Each target runs in a process of its own, since libFuzzer ends its process.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["transport.attestation"]):
    from transport.attestation import attestation_document, cbor, cose
    from transport.attestation.certificate_chain import ChainVerifier
    from transport.attestation.dev_authority import DevAttester, DevAuthority, dev_verifier
    from transport.attestation.evidence_binding import Binding
    from transport.attestation.nsm import Nsm
    from transport.errors import DeviceError, ProtocolError

from command_line import Parser, whole

DEFAULT_RUNS = 1_000_000
MAX_INPUT_BYTES = 6000  # a recorded document has 4.5 KB
RECORDED = Path(__file__).parents[2] / "shared" / "fixtures" / "nitro"

AUTHORITY = DevAuthority.create(datetime.now(UTC))
BINDING = Binding(b"stage/1", b"h" * 32, b"s" * 32, b"n" * 32)
EVIDENCE = DevAttester(AUTHORITY, {0: b"\x01" * 48}).attest(BINDING)
READ = attestation_document.parse(cose.parse(EVIDENCE).payload)
CHAINS = ChainVerifier(AUTHORITY.root_cert)
VERIFIER = dev_verifier(AUTHORITY.root_cert, None)


class FixedNsm(Nsm):
    """A module whose device answers with the fuzzer's bytes."""

    response = b""

    def _exchange(self, request: bytes) -> bytes:
        return self.response


def fuzz_chain(data: bytes) -> None:
    """The bytes as leaf, and as intermediate below a genuine root."""
    with contextlib.suppress(ProtocolError):
        CHAINS.verify(data, READ.cabundle)
    with contextlib.suppress(ProtocolError):
        CHAINS.verify(READ.certificate, (*READ.cabundle, data))


def fuzz_nsm(data: bytes) -> None:
    nsm = FixedNsm()
    nsm.response = data
    for ask in (nsm.describe, nsm.random, lambda: nsm.describe_pcr(0)):
        with contextlib.suppress(DeviceError):
            ask()


TARGETS: dict[str, Callable[[bytes], object]] = {
    "cbor": cbor.decode,
    "cose": cose.parse,
    "document": attestation_document.parse,
    "chain": fuzz_chain,
    "verifier": lambda data: VERIFIER.verify(data, BINDING),
    "nsm": fuzz_nsm,
}


def seeds() -> list[bytes]:
    """Well-formed inputs to start from, for all targets together."""
    recorded = [path.read_bytes() for path in sorted(RECORDED.glob("*.cbor"))]
    found = [EVIDENCE, *recorded]
    for evidence in (EVIDENCE, *recorded):
        payload = cose.parse(evidence).payload
        read = attestation_document.parse(payload)
        found += [payload, read.certificate, *read.cabundle]
    found.append(cbor.encode({"DescribePCR": {"data": bytes(48), "lock": True}}))
    found.append(b"\xbf\x61a\x9f\x01\x5f\x41b\xff\xff\xff")
    return found


def fuzz(target: str, runs: int, corpus: Path) -> None:
    """Never returns: libFuzzer exits, with 0 where nothing was found."""

    def one_input(data: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            TARGETS[target](data)

    for index, seed in enumerate(seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    findings = Path.cwd() / f"crash-{target}-"
    arguments = [f"-runs={runs}", f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={findings}"]
    atheris.Setup([sys.argv[0], *arguments, "-verbosity=0", str(corpus)], one_input)
    atheris.Fuzz()


def fuzz_apart(target: str, runs: int) -> bool:
    """Whether a process of its own found nothing; prints what it found."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{target}-") as corpus:
        command = [sys.executable, __file__, target, f"--runs={runs}", f"--corpus={corpus}"]
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    if done.returncode:
        print(done.stdout.decode(errors="replace"))
    verdict = "nothing found" if done.returncode == 0 else "FAILED"
    print(f"{target}: {runs} inputs, {time.monotonic() - started:.0f} s: {verdict}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = Parser(prog="fuzz_attestation", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument(
        "--runs", type=whole(1), default=DEFAULT_RUNS, help="inputs for each target"
    )
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)  # in this very process
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; choose of {', '.join(TARGETS)}")
    targets = arguments.targets or list(TARGETS)
    if arguments.corpus is not None:
        fuzz(targets[0], arguments.runs, arguments.corpus)
    results = [fuzz_apart(target, arguments.runs) for target in targets]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
