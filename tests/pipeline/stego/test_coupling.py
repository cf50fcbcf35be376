from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stego.coupling import greedy_coupling


def coupling(rows, columns):
    ordered = sorted((-mass, index) for index, mass in enumerate(rows))
    return greedy_coupling(ordered, [(-mass, index) for index, mass in enumerate(columns)])


def reference(rows, columns):
    """The published algorithm to the letter: the largest left of each side, until none is."""
    rows, columns = list(rows), list(columns)
    while any(rows):
        row, column = rows.index(max(rows)), columns.index(max(columns))
        mass = min(rows[row], columns[column])
        yield row, column, mass
        rows[row] -= mass
        columns[column] -= mass


def entropy(masses):
    shares = np.array([mass for mass in masses if mass], float) / sum(masses)
    return -(shares * np.log2(shares)).sum()


def greatest_lower_bound(rows, columns):
    """What both majorise most tightly; no coupling has less entropy (Cicalese, Vaccaro 2002)."""
    size = max(len(rows), len(columns))
    sides = [sorted(side, reverse=True) + [0] * (size - len(side)) for side in (rows, columns)]
    return np.diff(np.minimum(*map(np.cumsum, sides)), prepend=0)


@st.composite
def marginals(draw):
    rows = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
    columns = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
    return [each * sum(columns) for each in rows], [each * sum(rows) for each in columns]


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ([2, 2], [2, 2], [(0, 0, 2), (1, 1, 2)]),
        ([1, 2], [2, 1], [(1, 0, 2), (0, 1, 1)]),
        ([4], [1, 2, 1], [(0, 1, 2), (0, 0, 1), (0, 2, 1)]),
        ([2, 2], [2, 1, 1], [(0, 0, 2), (1, 1, 1), (1, 2, 1)]),
        # .75 .25 and .6 .3 .1, the example of the published implementation
        ([15, 5], [12, 6, 2], [(0, 0, 12), (1, 1, 5), (0, 2, 2), (0, 1, 1)]),
        ([5, 5], [4, 3, 3], [(0, 0, 4), (1, 1, 3), (1, 2, 2), (0, 2, 1)]),
    ],
)
def test_small_couplings_are_these(rows, columns, expected):
    assert list(coupling(rows, columns)) == expected


@given(marginals())
def test_a_coupling_is_the_published_algorithms(sides):
    assert list(coupling(*sides)) == list(reference(*sides))


@given(marginals())
def test_a_coupling_has_its_marginals_and_few_entries(sides):
    rows, columns = sides
    entries = list(coupling(rows, columns))
    by_row, by_column = Counter(), Counter()
    for row, column, mass in entries:
        by_row[row] += mass
        by_column[column] += mass
    assert by_row == dict(enumerate(rows))
    assert by_column == dict(enumerate(columns))
    assert len(entries) <= len(rows) + len(columns) - 1


@given(marginals())
def test_a_couplings_entropy_is_near_the_least(sides):
    least = entropy(greatest_lower_bound(*sides))
    assert least - 1e-9 <= entropy([mass for *_, mass in coupling(*sides)]) <= least + 1


def test_rows_are_read_no_further_than_entries_are_asked_for():
    def rows():
        yield from ((-4, 0), (-4, 1))
        pytest.fail("not yet")

    entries = greedy_coupling(rows(), [(-6, 0), (-6, 1)])
    assert list(islice(entries, 1)) == [(0, 0, 4)]
