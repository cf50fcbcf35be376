from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from enclave import cli, eif, signing

Signer = Callable[[ec.EllipticCurve], tuple[bytes, bytes]]


@pytest.fixture
def path(tmp_path: Path, image: eif.Image) -> Path:
    target = tmp_path / "image.eif"
    target.write_bytes(b"".join(eif.pack(image)))
    return target


def _pcr(image: eif.Image, index: int) -> str:
    return f"{index}={eif.measure(image)[index].hex()}"


def test_describe_prints_measurements(
    path: Path, image: eif.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["describe", str(path), "-j"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["Measurements"]["PCR0"] == eif.measure(image)[0].hex()
    assert report["Cmdline"] == "console=ttyS0"
    assert cli.main(["describe", str(path)]) == 0
    assert f"PCR2: {eif.measure(image)[2].hex()}" in capsys.readouterr().out


def test_verify_accepts_right_registers_and_names_wrong_ones(
    path: Path, image: eif.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(path), "--pcr", _pcr(image, 0), "--pcr", _pcr(image, 2)]) == 0
    assert "2 PCRs compared" in capsys.readouterr().out
    assert cli.main(["verify", str(path), "--pcr", _pcr(image, 0).replace("0=", "1=", 1)]) == 1
    assert capsys.readouterr().err.startswith("PCR1 differs")
    assert cli.main(["verify", str(path), "--pcr", _pcr(image, 0).replace("0=", "8=", 1)]) == 1
    assert "absent" in capsys.readouterr().err


def test_verify_checks_a_signature(
    path: Path, image: eif.Image, signer: Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    signed = signing.sign(image, *signer(ec.SECP384R1()))
    path.write_bytes(b"".join(eif.pack(signed)))
    assert cli.main(["verify", str(path)]) == 0
    ramdisk = eif.Section(eif.SectionType.RAMDISK, b"other")
    path.write_bytes(b"".join(eif.pack(signed.with_section(ramdisk))))
    assert cli.main(["verify", str(path)]) == 2
    assert "another PCR0" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "0=zz", "0=ab", "32=" + "00" * 48, "x=" + "00" * 48])
def test_malformed_register_is_bad_usage(
    path: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", str(path), "--pcr", value])
    assert exit_.value.code == 2
    assert "--pcr" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["describe", "verify"])
@pytest.mark.parametrize("damage", ["cut short", "CRC-32"])
def test_a_damaged_image_is_one_line_and_exit_code_2(
    path: Path, command: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-5] if damage == "cut short" else data[:-1] + bytes([data[-1] ^ 1]))
    assert cli.main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert damage in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["describe", "verify"])
@pytest.mark.parametrize("content", [None, b"", b"x" * 10, b".eif" + bytes(600)])
def test_bad_image_is_one_line_and_exit_code_2(
    tmp_path: Path, command: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "bad.eif"
    if content is not None:
        target.write_bytes(content)
    assert cli.main([command, str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "bad.eif" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--stage-dir", "nowhere"], "lacks|run.json"),
        (["--manifest", "m.json"], "--stage and --model-dir"),
        (["--stage-dir", ".", "--signing-key", "k"], "go together"),
    ],
)
def test_incomplete_build_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.eif"
    assert cli.main(["build", *arguments, "--cache", str(tmp_path), "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert any(word in error for word in reason.split("|"))
    assert not output.exists()


def test_pin_writes_the_measurements_of_one_stage(
    path: Path, tmp_path: Path, image: eif.Image
) -> None:
    manifest = tmp_path / "manifest.json"
    stages = [{"stage_idx": 0, "layer_end": 6}, {"stage_idx": 1, "expected_measurements": {}}]
    manifest.write_text(json.dumps({"model_name": "é", "stages": stages}))
    assert cli.main(["pin", str(path), "--manifest", str(manifest), "--stage", "1"]) == 0
    document = json.loads(manifest.read_text())
    expected = {str(index): value.hex() for index, value in eif.measure(image).items()}
    assert document == {
        "model_name": "é",
        "stages": [stages[0], {"stage_idx": 1, "expected_measurements": expected}],
    }


def test_an_image_is_held_against_the_pins_of_its_stage(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.json"
    other = {"stage_idx": 1, "expected_measurements": {"0": "00" * 48}}
    manifest.write_text(json.dumps({"stages": [{"stage_idx": 0}, other]}))
    verify = ["verify", str(path), "--manifest", str(manifest), "--stage"]
    assert cli.main([*verify, "0"]) == 2
    assert "pins no measurement for stage 0" in capsys.readouterr().err
    assert cli.main(["pin", str(path), "--manifest", str(manifest), "--stage", "0"]) == 0
    assert cli.main([*verify, "0"]) == 0
    assert cli.main([*verify, "1"]) == 1
    assert "PCR0 differs" in capsys.readouterr().err


@pytest.mark.parametrize("pins", [{"0": "zz" * 48}, {"0": "00" * 47}, {"x": "00" * 48}, {"0": 7}])
def test_pins_that_are_no_measurements_are_named(
    path: Path, tmp_path: Path, pins: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"stages": [{"stage_idx": 0, "expected_measurements": pins}]}))
    assert cli.main(["verify", str(path), "--manifest", str(manifest), "--stage", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "of stage 0 is not" in error


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stages": []}', '{"stages": [1]}'])
def test_unfit_manifest_is_left_alone(
    path: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(content)
    assert cli.main(["pin", str(path), "--manifest", str(manifest), "--stage", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert manifest.read_text() == content


def test_boot_without_tools_says_how_to_get_them(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sockets = ["--vsock", str(tmp_path / "v"), "--console", str(tmp_path / "c")]
    assert cli.main(["boot", str(path), *sockets, "--cache", str(tmp_path)]) == 2
    assert "build_enclave_tools.sh" in capsys.readouterr().err


def test_without_a_home_only_what_needs_the_cache_says_so(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("VEILPIPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cli.main(["describe", str(path)]) == 0
    assert cli.main(["build", "--stage-dir", str(tmp_path), "-o", str(tmp_path / "x.eif")]) == 2
    error = capsys.readouterr().err
    assert "VEILPIPE_CACHE" in error
    assert error.count("\n") == 1
