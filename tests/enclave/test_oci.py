from __future__ import annotations

import hashlib
import json
import stat
import tarfile
from pathlib import Path

import pytest

from enclave import build, cli, cpio, oci
from enclave.errors import BuildError

_LAYERS = (
    [
        cpio.directory("tmp", 0o1777),
        cpio.Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
        cpio.regular("etc/nsswitch.conf", b"hosts: files\n"),
        cpio.symlink("usr/bin/python3", "python3.11"),
    ],
    [cpio.regular("long/" * 40 + "name", b"x" * 3000, 0o755), *oci.command_entries()],
)


def _blob(layout: Path, described: dict[str, object]) -> Path:
    """The file of a descriptor, which has to say the truth of it."""
    kind, _, digest = str(described["digest"]).partition(":")
    path = layout / "blobs" / kind / digest
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert path.stat().st_size == described["size"]
    return path


def _manifest(layout: Path) -> dict[str, object]:
    (described,) = json.loads((layout / "index.json").read_text())["manifests"]
    return json.loads(_blob(layout, described).read_text())


def test_whatever_is_named_is_there_and_has_the_digest_that_it_is_named_by(tmp_path: Path) -> None:
    digest = oci.write_layout(tmp_path / "image", "veilpipe", _LAYERS)
    index = json.loads((tmp_path / "image/index.json").read_text())
    assert index["manifests"][0]["digest"] == digest
    manifest = _manifest(tmp_path / "image")
    config = json.loads(_blob(tmp_path / "image", manifest["config"]).read_text())
    assert config["rootfs"]["diff_ids"] == [each["digest"] for each in manifest["layers"]]
    named = {each["digest"].partition(":")[2] for each in manifest["layers"]}
    named |= {manifest["config"]["digest"].partition(":")[2], digest.partition(":")[2]}
    assert {path.name for path in (tmp_path / "image/blobs/sha256").iterdir()} == named
    assert json.loads((tmp_path / "image/oci-layout").read_text()) == {
        "imageLayoutVersion": "1.0.0"
    }


def test_layers_hold_files_of_root_without_dates_and_no_devices(tmp_path: Path) -> None:
    oci.write_layout(tmp_path / "image", "veilpipe", _LAYERS)
    found = {}
    for layer in _manifest(tmp_path / "image")["layers"]:
        with tarfile.open(_blob(tmp_path / "image", layer)) as archive:
            for member in archive:
                assert (member.uid, member.gid, member.mtime) == (0, 0, 0)
                file = archive.extractfile(member) if member.isreg() else None
                found[member.name] = (member, file and file.read())
    assert found["tmp"][0].mode == 0o1777
    assert "dev/null" not in found
    assert found["usr/bin/python3"][0].linkname == "python3.11"
    member, data = found["long/" * 40 + "name"]
    assert (member.mode, data) == (0o755, b"x" * 3000)
    # A container asks for the names of other hosts; the later layer counts.
    assert found["etc/nsswitch.conf"][1] == b"hosts: files dns\n"
    assert found["usr/local/bin/stage-worker"][0].mode == 0o755


def test_the_same_files_are_the_same_image_and_others_another(tmp_path: Path) -> None:
    first = oci.write_layout(tmp_path / "a", "veilpipe", _LAYERS)
    assert oci.write_layout(tmp_path / "b", "other", _LAYERS) == first
    changed = [[*_LAYERS[0], cpio.regular("one", b"more")], _LAYERS[1]]
    assert oci.write_layout(tmp_path / "c", "veilpipe", changed) != first


def test_it_runs_as_nobody_of_the_host(tmp_path: Path) -> None:
    oci.write_layout(tmp_path / "image", "veilpipe", _LAYERS)
    manifest = _manifest(tmp_path / "image")
    config = json.loads(_blob(tmp_path / "image", manifest["config"]).read_text())["config"]
    assert config["User"] == "65532:65532"
    assert config["Cmd"][0] in oci.COMMANDS


def test_commands_are_mains_of_this_project_and_what_they_import_is_pinned() -> None:
    found = build.code_closure(roots=tuple(oci.COMMANDS.values()))
    for module in oci.COMMANDS.values():
        source = (build.PROJECT_ROOT / module.replace(".", "/")).with_suffix(".py")
        assert "\ndef main() -> None:" in source.read_text()
        assert source.relative_to(build.PROJECT_ROOT) in found.files
    # Nothing foreign that a stage's image would not have.
    assert found.foreign <= build.code_closure().foreign | {"__future__"}


def test_what_is_there_is_left_alone_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    with pytest.raises(BuildError, match="exists"):
        oci.write_layout(tmp_path / "image", "veilpipe", _LAYERS)
    with pytest.raises(RuntimeError):
        oci.write_layout(tmp_path / "other", "veilpipe", [_failing()])
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def _failing():  # type: ignore[no-untyped-def]
    yield cpio.regular("a", b"b")
    raise RuntimeError("half-way")


def test_packages_that_have_not_been_fetched_are_one_line(tmp_path: Path, capsys) -> None:
    output = tmp_path / "image"
    assert cli.main(["container", "-o", str(output), "--cache", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not output.exists()
