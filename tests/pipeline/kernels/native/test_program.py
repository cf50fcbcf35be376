"""A program makes the calls it was recorded with, on what their memory holds by then."""

import itertools
import threading
import weakref

import numpy as np
import pytest

RNG = np.random.default_rng(7)


@pytest.fixture
def program(native):
    return native.Program()


def floats(*shape):
    return np.zeros(shape, np.float32)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def silu(native, gate_up, y):
    native.silu_mul(gate_up, y, y.shape[0], y.shape[1])


def test_calls_are_recorded_first_and_made_by_every_run(native, program):
    gate_up, y = normal(3, 64), floats(3, 32)
    with program:
        silu(native, gate_up, y)
    assert not y.any()
    for _ in range(2):
        gate_up[:] = normal(3, 64)
        expected = floats(3, 32)
        silu(native, gate_up, expected)
        program.run()
        assert np.array_equal(y, expected)


def test_calls_are_made_in_their_order(native, program):
    rows = [np.full(4, i, np.float32) for i in range(100)]
    with program:
        for source, target in itertools.pairwise(rows):
            native.copy(source, target, 16)
    program.run()
    assert all(not row.any() for row in rows)


def test_it_keeps_the_arrays_it_was_recorded_with(native):
    program = native.Program()
    source, target = floats(4) + 1, floats(4)
    alive = weakref.ref(source)
    with program:
        native.copy(source, target, 16)
    del source
    assert alive() is not None
    program.run()
    assert (target == 1).all()
    del program
    assert alive() is None


def test_a_refused_call_ends_the_run(native, program):
    ids, table, row = np.array([1]), floats(2, 16) + 1, floats(1, 16)
    copied = floats(16)
    with program:
        native.lookup(native.F32, table, None, 2, 16, ids, 1, 1, False, row)
        native.copy(row, copied, 64)
    ids[0] = 2
    with pytest.raises(ValueError, match="no such row: 2"):
        program.run()
    assert not copied.any()
    ids[0] = 0
    program.run()
    assert (copied == 1).all()


def test_a_program_is_recorded_once_and_alone(native, program):
    with program:
        with pytest.raises(RuntimeError, match="one at a time"):
            native.Program().__enter__()
        with pytest.raises(RuntimeError, match="while one is recorded"):
            program.run()
        native.copy(floats(1), floats(1), 4)
    with pytest.raises(RuntimeError, match="recorded once"):
        program.__enter__()


def test_an_error_while_recording_ends_the_recording(native, program):
    source, target = floats(4) + 1, floats(4)
    with pytest.raises(ZeroDivisionError), program:
        raise ZeroDivisionError
    native.copy(source, target, 16)
    assert np.array_equal(target, source)


def test_another_threads_calls_are_not_recorded(native, program):
    source, target = floats(4) + 1, floats(4)
    with program:
        thread = threading.Thread(target=native.copy, args=(source, target, 16))
        thread.start()
        thread.join()
    assert np.array_equal(target, source)
    target[:] = 0
    program.run()
    assert not target.any()


def test_arrays_with_gaps_are_refused_where_no_strides_come_with_them(native):
    for gaps in (floats(8)[::2], floats(4, 4).T, floats(4, 4)[:, :2]):
        with pytest.raises((ValueError, BufferError), match="contiguous"):
            native.copy(gaps, floats(16), 16)
    ids, out = np.array([[1, 9], [0, 9]]), floats(2, 2)
    native.lookup(native.F32, np.eye(2, dtype=np.float32), None, 2, 2, ids[:, 0], 2, 2, False, out)
    assert out.tolist() == [[0, 1], [1, 0]]


def test_what_has_no_memory_of_its_own_is_refused(native):
    with pytest.raises(TypeError, match="bytes-like"):
        native.copy(object(), floats(1), 4)


def test_what_is_no_kernel_is_called_in_its_turn(native, program):
    source, between, target = floats(4), floats(4), floats(4)
    with program:
        native.copy(source, between, 16)
        native.call(lambda: between.__imul__(2))
        native.copy(between, target, 16)
    assert not target.any()
    for value in (1, 3):
        source[:] = value
        program.run()
        assert (target == 2 * value).all()


def test_what_is_called_may_call_kernels_itself(native, program):
    source, target = floats(4) + 1, floats(4)
    with program:
        native.call(lambda: native.copy(source, target, 16))
    program.run()
    assert (target == 1).all()


def test_what_is_raised_ends_the_run(native, program):
    target = floats(4)
    problems = [ZeroDivisionError("first")]

    def fail():
        if problems:
            raise problems.pop()

    with program:
        native.call(fail)
        native.copy(floats(4) + 1, target, 16)
    with pytest.raises(ZeroDivisionError, match="first"):
        program.run()
    assert not target.any()
    program.run()
    assert (target == 1).all()


def test_what_is_called_is_kept_as_long_as_the_program(native):
    program = native.Program()

    def nothing():
        pass

    alive = weakref.ref(nothing)
    with program:
        native.call(nothing)
    del nothing
    assert alive() is not None
    program.run()
    del program
    assert alive() is None


def test_outside_of_a_program_it_is_called_at_once(native):
    calls = []
    native.call(lambda: calls.append(1))
    assert calls == [1]
    with pytest.raises(ZeroDivisionError):
        native.call(lambda: 1 / 0)
