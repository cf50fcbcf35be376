"""The `pipeline-orch attest` commands: verify evidence by hand, offline."""

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import trio
import typer
from cryptography import x509

from pipeline.agreement.identity import load_identity
from pipeline.agreement.manifest import load_manifest
from pipeline.agreement.templates import with_cids
from pipeline.cli.error_reporting import new_app
from pipeline.cli.logs import printable
from pipeline.cli.shared_options import finite, read_cids
from pipeline.errors import InputError, SessionError
from pipeline.orchestrator.evidence_request import fetch_evidence
from transport.attestation.attestation_document import Document
from transport.attestation.document_verifier import CheckResult, aws_root, examine, read_document
from transport.attestation.evidence_binding import Binding
from transport.errors import AttestationError

MAX_DOCUMENT_BYTES = 1 << 20
PCR_BYTES = 48

app = new_app()

DocumentArgument = Annotated[
    Path, typer.Argument(metavar="DOC", help="An attestation document (CBOR, as the NSM gives it).")
]
JsonOption = Annotated[bool, typer.Option("--json", "-j", help="Print JSON.")]


@app.callback()
def attest() -> None:
    """Verify attestation documents by hand, without any network."""


@app.command()
def verify(
    document: Annotated[
        Path | None, typer.Argument(metavar="[DOC]", help="A document (CBOR); or ask --stage.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the PCRs from this manifest.")
    ] = None,
    stage: Annotated[
        int | None, typer.Option(metavar="I", help="Which stage of the manifest.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Another root than AWS's pinned one.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="ISO8601", help="Judge at this time [now].")
    ] = None,
    pcr: Annotated[
        list[str] | None, typer.Option(metavar="N=HEX", help="Expect this PCR; repeatable.")
    ] = None,
    allow_debug: Annotated[
        bool, typer.Option("--allow-debug", help="Accept PCR 0 of all zeros (debug mode).")
    ] = False,
    identity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your key, to ask a running stage.")
    ] = None,
    cid: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE=CID", help="A started enclave's [the manifest's]."),
    ] = None,
    connect_timeout: Annotated[
        float,
        typer.Option(
            min=0.1, metavar="SECONDS", help="Patience with a stage not up.", callback=finite
        ),
    ] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Judge a document check by check: exit 0 if every check passes, 1 if any fails.

    Without DOC, asks the running --stage of the --manifest for a fresh one, which then also has to
    be bound to that very handshake. Without PCRs to compare, prints the document's and judges the
    rest.
    """
    binding = None
    if document is not None:
        evidence = _read(document)
    else:
        evidence, binding = _ask(manifest, stage, identity, connect_timeout, read_cids(cid or []))
    expected = _expected(manifest, stage, pcr or [])
    results = examine(
        evidence,
        root=_load_root(root),
        now=_parse_time(at),
        expected=expected,
        allow_debug=allow_debug,
        binding=binding,
    )
    is_ok = all(result.ok for result in results)
    shown = _pcrs(evidence) if expected is None else {}
    if as_json:
        checks = [{"name": r.name, "ok": r.ok, "detail": r.detail} for r in results]
        print(json.dumps({"ok": is_ok, "checks": checks, "pcrs": shown}, indent=2))
    else:
        _print_results(results, shown)
    raise typer.Exit(0 if is_ok else 1)


@app.command()
def show(document: DocumentArgument, as_json: JsonOption = False) -> None:
    """Print what a document says, without judging any of it."""
    try:
        found = read_document(_read(document))
    except AttestationError as error:
        raise InputError(f"{document} is not an attestation document: {error}") from error
    fields = _describe(found)
    if as_json:
        print(json.dumps(fields, indent=2))
        return
    print("unverified:")
    for name, value in fields.items():
        if isinstance(value, dict):
            for index, digest in value.items():
                print(f"  PCR{index:<12} {digest}")
        else:
            print(f"  {name:<15} {printable(str(value))}")


def _print_results(results: list[CheckResult], pcrs: dict[int, str]) -> None:
    for result in results:
        print(f"{'pass' if result.ok else 'FAIL'}  {result.name:<14} {printable(result.detail)}")
    for index, digest in pcrs.items():
        print(f"PCR{index:<3} {digest}")
    failed = [result.name for result in results if not result.ok]
    if failed:
        print(f"pipeline-orch: error: refused: {', '.join(failed)}", file=sys.stderr)


def _ask(
    manifest: Path | None,
    stage: int | None,
    identity: Path | None,
    seconds: float,
    cids: Mapping[int, int],
) -> tuple[bytes, Binding]:
    if manifest is None or stage is None or identity is None:
        raise InputError("give a document, or --manifest, --stage and --identity to ask a stage")
    loaded, key = with_cids(load_manifest(manifest), cids), load_identity(identity)

    async def ask() -> tuple[bytes, Binding]:
        with trio.move_on_after(seconds):
            return await fetch_evidence(loaded, loaded.stage(stage).stage_idx, key)
        raise SessionError(f"gave up after {seconds:g} s: stage {stage} is not up")

    return trio.run(ask)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            evidence = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(evidence) > MAX_DOCUMENT_BYTES:
        raise InputError(f"{path} is over {MAX_DOCUMENT_BYTES} bytes: nothing of that kind is")
    return evidence


def _expected(manifest: Path | None, stage: int | None, pcrs: list[str]) -> dict[int, bytes] | None:
    if (manifest is None) != (stage is None):
        raise InputError("--manifest and --stage go together")
    expected: dict[int, bytes] = {}
    if manifest is not None and stage is not None:
        expected = load_manifest(manifest).stage(stage).measurements()
        if not expected:
            raise InputError(f"{manifest} pins no measurement for stage {stage}")
    for text in pcrs:
        index, value = _parse_pcr(text)
        expected[index] = value
    return expected or None


def _parse_pcr(text: str) -> tuple[int, bytes]:
    index, _, digest = text.partition("=")
    try:
        number, value = int(index), bytes.fromhex(digest)
    except ValueError:
        raise InputError(f"--pcr {text!r} is not N=HEX, such as 0=ab12…") from None
    if not 0 <= number < 32 or len(value) != PCR_BYTES:
        raise InputError(
            f"--pcr {index}: {len(value)} bytes of hex, expected {PCR_BYTES}, index 0 to 31"
        )
    return number, value


def _parse_time(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InputError(f"--at {text!r} is not ISO 8601, such as 2026-01-31T12:00:00Z") from None


def _load_root(path: Path | None) -> x509.Certificate:
    if path is None:
        return aws_root()
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise InputError(f"{path} is not a PEM certificate") from error


def _pcrs(evidence: bytes) -> dict[int, str]:
    try:
        return {index: value.hex() for index, value in read_document(evidence).pcrs.items()}
    except AttestationError:
        return {}  # the checks have said why


def _describe(found: Document) -> dict[str, Any]:
    return {
        "module_id": found.module_id,
        "timestamp": _date(found.timestamp_ms),
        "pcrs": {index: value.hex() for index, value in sorted(found.pcrs.items())},
        "cabundle": f"{len(found.cabundle)} certificates",
        "public_key": _hex(found.public_key),
        "user_data": _hex(found.user_data),
        "nonce": _hex(found.nonce),
    }


def _date(milliseconds: int) -> str:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{milliseconds} ms, no date"


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()
