"""A program makes the calls it was recorded with, on what their memory holds by then."""

import itertools
import threading
import weakref

import pytest
import torch


@pytest.fixture
def program(native):
    return native.Program()


def silu(native, gate_up, y):
    native.silu_mul(gate_up, y, y.shape[0], y.shape[1])


def test_calls_are_recorded_first_and_made_by_every_run(native, program):
    gate_up, y = torch.randn(3, 64), torch.zeros(3, 32)
    with program:
        silu(native, gate_up, y)
    assert not y.any()
    for _ in range(2):
        gate_up.normal_()
        expected = torch.empty(3, 32)
        silu(native, gate_up, expected)
        program.run()
        assert y.equal(expected)


def test_calls_are_made_in_their_order(native, program):
    rows = [torch.full((4,), float(i)) for i in range(100)]
    with program:
        for source, target in itertools.pairwise(rows):
            native.copy(source, target, 16)
    program.run()
    assert all(not row.any() for row in rows)


def test_it_keeps_the_tensors_it_was_recorded_with(native):
    program = native.Program()
    source, target = torch.ones(4), torch.zeros(4)
    alive = weakref.ref(source)
    with program:
        native.copy(source, target, 16)
    del source
    assert alive() is not None
    program.run()
    assert target.equal(torch.ones(4))
    del program
    assert alive() is None


def test_a_refused_call_ends_the_run(native, program):
    ids, table, row = torch.tensor([1]), torch.ones(2, 16), torch.zeros(1, 16)
    copied = torch.zeros(16)
    with program:
        native.lookup(native.F32, table, None, 2, 16, ids, 1, 1, False, row)
        native.copy(row, copied, 64)
    ids[0] = 2
    with pytest.raises(ValueError, match="no such row: 2"):
        program.run()
    assert not copied.any()
    ids[0] = 0
    program.run()
    assert copied.equal(torch.ones(16))


def test_a_program_is_recorded_once_and_alone(native, program):
    with program:
        with pytest.raises(RuntimeError, match="one at a time"):
            native.Program().__enter__()
        with pytest.raises(RuntimeError, match="while one is recorded"):
            program.run()
        native.copy(torch.ones(1), torch.zeros(1), 4)
    with pytest.raises(RuntimeError, match="recorded once"):
        program.__enter__()


def test_an_error_while_recording_ends_the_recording(native, program):
    source, target = torch.ones(4), torch.zeros(4)
    with pytest.raises(ZeroDivisionError), program:
        raise ZeroDivisionError
    native.copy(source, target, 16)
    assert target.equal(source)


def test_another_threads_calls_are_not_recorded(native, program):
    source, target = torch.ones(4), torch.zeros(4)
    with program:
        thread = threading.Thread(target=native.copy, args=(source, target, 16))
        thread.start()
        thread.join()
    assert target.equal(source)
    target.zero_()
    program.run()
    assert not target.any()
