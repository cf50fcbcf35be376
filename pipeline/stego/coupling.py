"""Greedy minimum-entropy coupling of two distributions, in whole numbers.

A coupling is a joint distribution with two given marginals; the less entropy it has, the more one
side tells of the other. The greedy one pairs what is likeliest on both sides, for as much mass as
both have, until nothing is left. Source: Kocaoglu et al. 2017, algorithm 1, which the published
iterative schemes (arXiv 2107.08295, 2405.19540) build on. It is at most 0.53 bits above the least
(arXiv 2302.11838) and has at most n + m - 1 entries of the n x m.
"""

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush, heapreplace


def greedy_coupling(
    rows: Iterable[tuple[int, int]], columns: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """The entries (row, column, mass) above 0, largest first, computed as they are asked for.

    Both marginals are pairs (-mass, index), masses above 0 and of equal sums; rows come in rising
    order, so the likeliest first and of equal ones the lowest index, and are read no further than
    needed.
    """
    unread = iter(rows)
    newest = next(unread, None)
    open_rows = [newest] if newest else []  # those begun, and the likeliest that is not
    open_columns = list(columns)
    heapify(open_columns)
    while open_rows:
        row, column = open_rows[0], open_columns[0]
        if row is newest:
            newest = next(unread, None)
            if newest:
                heappush(open_rows, newest)
        rest = column[0] - row[0]
        if rest < 0:
            yield row[1], column[1], -row[0]
            heapreplace(open_columns, (rest, column[1]))
            heappop(open_rows)
            continue
        yield row[1], column[1], -column[0]
        heappop(open_columns)
        if rest:
            heapreplace(open_rows, (-rest, row[1]))
        else:
            heappop(open_rows)
