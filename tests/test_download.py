"""What download_model.sh refuses, and what it leaves alone."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def download(*arguments):
    return subprocess.run(
        ["bash", ROOT / "scripts/download_model.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_model_is_refused():
    result = download("gpt5")
    assert result.returncode == 2
    assert "unknown model 'gpt5'; use smollm2 or gpt2" in result.stderr


def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    result = download("smollm2", tmp_path)
    assert result.returncode == 2
    assert str(tmp_path) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_finished_download_is_not_fetched_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "SHA256SUMS").write_text("")
    result = download("gpt2", tmp_path)
    assert result.returncode == 0
    assert "is ready" in result.stderr
