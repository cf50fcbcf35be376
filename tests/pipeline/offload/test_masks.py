"""Masks are used once: by whoever draws first, also where that one is killed before using them."""

import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

from pipeline.errors import InputError, PolicyError
from pipeline.offload import mask_ledger
from pipeline.offload.errors import MasksSpent, MasksUnusable
from pipeline.offload.mask_file import USED_AT, write_masks
from pipeline.offload.mask_ledger import MaskLedger
from pipeline.offload.masks import open_masks

from .conftest import NUM_MASKS

# Draws, says so, and waits to be killed; with what it has drawn nothing is ever hidden.
DRAWER = """
import sys, time
from contextlib import closing
from pathlib import Path
from pipeline.offload.masks import open_masks
with closing(open_masks(Path(sys.argv[1]))) as masks:
    hidden = masks.draw(0, int(sys.argv[2]))
    print(hidden.masks.tobytes().hex(), flush=True)
    time.sleep(600)
"""


def rows(words):
    return {row.tobytes() for row in words}


def test_a_mask_comes_with_what_its_linear_makes_of_it(held, mask_file):
    with closing(open_masks(mask_file)) as masks:
        for index, linear in enumerate(held):
            for count in (1, 3, 2):
                hidden = masks.draw(index, count)
                assert (linear.product(hidden.masks) == hidden.products).all()


def test_no_mask_is_drawn_twice_by_one_or_by_several(held, mask_file):
    seen, num_drawn = set(), 0
    with closing(open_masks(mask_file)) as one, closing(open_masks(mask_file)) as other:
        for masks, index, count in (
            (one, 0, 3),
            (other, 0, 5),
            (one, 1, 7),
            (other, 1, 1),
            (one, 0, 9),
        ):
            found = rows(masks.draw(index, count).masks)
            assert len(found) == count
            assert not found & seen
            seen |= found
            num_drawn += count
    with closing(open_masks(mask_file)) as again:
        assert not rows(again.draw(0, 4).masks) & seen


def test_linears_share_no_mask(held, mask_file):
    with closing(open_masks(mask_file)) as masks:
        drawn = [masks.draw(index, 2).masks[:, :8] for index in range(len(held))]
    assert len(rows(np.concatenate(drawn))) == 2 * len(held)


def test_threads_that_draw_at_once_get_masks_of_their_own(mask_file):
    found = []
    with closing(open_masks(mask_file)) as masks:

        def draw():
            for _ in range(3):
                found.append(masks.draw(0, 1).masks)

        threads = [threading.Thread(target=draw) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert len(rows(np.concatenate(found))) == 24


def test_who_is_killed_between_drawing_and_using_shares_no_mask_with_anybody(mask_file):
    seen = set()
    for count in (1, 3, 2):
        drawer = subprocess.Popen(
            [sys.executable, "-c", DRAWER, mask_file, str(count)], stdout=subprocess.PIPE
        )
        with drawer:
            drawn = bytes.fromhex(drawer.stdout.readline().decode())
            drawer.send_signal(signal.SIGKILL)
        found = rows(np.frombuffer(drawn, np.uint64).reshape(count, -1))
        assert len(found) == count
        assert not found & seen
        seen |= found
    with closing(open_masks(mask_file)) as masks:
        assert masks.num_left == NUM_MASKS - 6
        assert not rows(masks.draw(0, NUM_MASKS - 6).masks) & seen


def test_masks_count_as_used_on_disk_before_anybody_has_them(mask_file, monkeypatch):
    on_disk = []
    real = os.fdatasync

    def sync(descriptor):
        real(descriptor)
        on_disk.append(int.from_bytes(mask_file.read_bytes()[USED_AT : USED_AT + 8], "little"))

    monkeypatch.setattr(mask_ledger.os, "fdatasync", sync)
    with closing(open_masks(mask_file)) as masks:
        masks.draw(0, 3)
        assert on_disk == [3]
        masks.draw(1, 2)
        assert on_disk == [3]
        masks.draw(1, 2)
        assert on_disk == [3, 4]


def test_a_disk_that_takes_no_note_gives_no_mask(mask_file, monkeypatch):
    def fails(descriptor):
        raise OSError(5, "Input/output error")

    with closing(open_masks(mask_file)) as masks:
        monkeypatch.setattr(mask_ledger.os, "fdatasync", fails)
        with pytest.raises(MasksUnusable, match="Input/output"):
            masks.draw(0, 1)


def test_masks_that_are_not_enough_are_refused_all_and_the_error_says_what_to_run(mask_file):
    with closing(open_masks(mask_file)) as masks:
        masks.draw(0, NUM_MASKS - 2)
        with pytest.raises(MasksSpent, match=r"2 of 24 masks are left and 3 .*masks make"):
            masks.draw(0, 3)
        assert masks.num_left == 2
        masks.draw(0, 2)
        with pytest.raises(MasksSpent, match="0 of 24"):
            masks.draw(0, 1)


def test_a_ledger_that_says_more_than_there_is_has_nothing_left(tmp_path):
    path = tmp_path / "ledger"
    path.write_bytes(b"\xff" * 8)
    with path.open("r+b") as file, pytest.raises(MasksSpent, match="0 of 5"):
        MaskLedger(file.fileno(), 0, 5).reserve(1)


def test_a_file_of_masks_is_its_owners_alone(mask_file):
    assert stat.S_IMODE(mask_file.stat().st_mode) == 0o600
    mask_file.chmod(0o640)
    with pytest.raises(PolicyError, match="chmod 600"):
        open_masks(mask_file)


def test_masks_that_are_there_are_never_written_over(held, mask_file):
    before = mask_file.read_bytes()
    with pytest.raises(InputError, match="File exists"):
        write_masks(mask_file, held, [], 2)
    assert mask_file.read_bytes() == before
    assert [each.name for each in mask_file.parent.iterdir()] == [mask_file.name]


def test_two_files_have_nothing_in_common(held, mask_file, tmp_path):
    write_masks(tmp_path / "other", held, [], NUM_MASKS)
    with closing(open_masks(mask_file)) as one, closing(open_masks(tmp_path / "other")) as other:
        assert not rows(one.draw(0, NUM_MASKS).masks) & rows(other.draw(0, NUM_MASKS).masks)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda data: b"", "no file of masks"),
        (lambda data: b"x" * 100, "no file of masks"),
        (lambda data: data[:20], "no file of masks"),
        (lambda data: data[:200], "damaged"),
        (lambda data: data[:40] + b"\0" + data[41:], "damaged"),
        (lambda data: data[:24] + b"\xff" * 8 + data[32:], "no file of masks"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: data + b"x", "cut off"),
    ],
)
def test_what_is_no_whole_file_of_masks_is_refused(mask_file, harm, problem):
    mask_file.write_bytes(harm(mask_file.read_bytes()))
    with pytest.raises(InputError, match=problem):
        open_masks(mask_file)


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        open_masks(tmp_path / "none")
