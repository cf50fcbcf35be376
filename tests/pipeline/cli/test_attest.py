"""Verifying evidence by hand: the real documents, and what a user gets wrong."""

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.cli import pipeline_orch
from transport.attestation import cose
from transport.attestation.attestation_document import Document

NITRO = Path(__file__).resolve().parents[4] / "shared" / "fixtures" / "nitro"
needs_documents = pytest.mark.skipif(
    not NITRO.is_dir(), reason="recorded Nitro documents are absent (../shared/fixtures/nitro)"
)
DOCUMENT = NITRO / "valid-2024-09-17.cbor"
AT = "2024-09-17T20:47:30Z"


@pytest.fixture
def attest(monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipeline-orch", "attest", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            pipeline_orch.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return caught.value.code, out, err

    return run


@needs_documents
def test_a_real_document_passes_at_its_own_time_with_debug_allowed(attest):
    code, out, err = attest("verify", DOCUMENT, "--at", AT, "--allow-debug")
    assert (code, err) == (0, "")
    assert "pass  signature" in out
    assert "PCR3" in out


@needs_documents
@pytest.mark.parametrize(
    ("extra", "failed"),
    [
        (["--at", AT], "debug"),
        (["--at", "2024-09-17T23:48:00Z", "--allow-debug"], "validity"),
        (["--at", AT, "--allow-debug", "--pcr", "3=" + "ab" * 48], "pcr"),
    ],
)
def test_what_does_not_hold_is_named_and_exits_with_one(attest, extra, failed):
    code, out, _ = attest("verify", DOCUMENT, *extra, "-j")
    assert code == 1
    report = json.loads(out)
    assert report["ok"] is False
    assert any(failed in check["name"] for check in report["checks"] if not check["ok"])


@needs_documents
def test_a_bad_signature_fails(attest):
    code, out, _ = attest("verify", NITRO / "invalid-signature.cbor", "--at", AT, "--allow-debug")
    assert code == 1
    assert "FAIL  signature" in out


@needs_documents
def test_the_documents_own_pcr_compares_equal(attest):
    _, out, _ = attest("show", DOCUMENT, "-j")
    pcr3 = json.loads(out)["pcrs"]["3"]
    code, _, _ = attest("verify", DOCUMENT, "--at", AT, "--allow-debug", "--pcr", f"3={pcr3}")
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["verify", "/nowhere.cbor"], "/nowhere.cbor"),
        (["verify", __file__, "--pcr", "0=zz"], "0=zz"),
        (["verify", __file__, "--pcr", "0=abcd"], "expected 48"),
        (["verify", __file__, "--pcr", "32=" + "ab" * 48], "0 to 31"),
        (["verify", __file__, "--at", "yesterday"], "yesterday"),
        (["verify", __file__, "--root", __file__], "PEM"),
        (["verify", __file__, "--stage", "0"], "--manifest"),
        (["show", __file__], "not an attestation document"),
        (["verify"], "give a document"),
        (["verify", "--stage", "0"], "--identity"),
    ],
)
def test_bad_input_is_one_line_and_exits_with_two(attest, arguments, word):
    code, _, err = attest(*arguments)
    assert code == 2
    assert word in err
    assert len(err.strip().splitlines()) == 1


def signed(path, *, timestamp_ms=1, module_id="i-1"):
    document = Document(
        module_id=module_id, timestamp_ms=timestamp_ms, pcrs={0: bytes(48)},
        certificate=b"x", cabundle=(b"x",),
    )  # fmt: skip
    path.write_bytes(cose.sign(document.encode(), ec.generate_private_key(ec.SECP384R1())))
    return path


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_time_beyond_all_calendars_is_shown_as_it_is(attest, tmp_path, command):
    code, out, _ = attest(command, signed(tmp_path / "d", timestamp_ms=1 << 62))
    assert code == (0 if command == "show" else 1)
    assert command == "verify" or f"{1 << 62} ms, no date" in out


@pytest.mark.parametrize("command", ["show", "verify"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_document_cannot_drive_the_terminal_or_forge_a_line(attest, tmp_path, command, flags):
    forged = "\x1b]0;owned\x07\r\nPCR0             00\u202e\x9b"
    _, out, err = attest(command, signed(tmp_path / "d", module_id=forged), *flags)
    assert not set("\x1b\x07\r\u202e\x9b") & set(out + err)
    assert "\nPCR0             00" not in out


def test_a_moment_outside_all_calendars_is_refused(attest):
    code, _, err = attest("verify", __file__, "--at", "0001-01-01T00:00+23:00")
    assert code == 2
    assert "ISO 8601" in err
