"""The orthogonal matrix between two sets of rows, by least squares (Procrustes).

Known rows H and what the server holds of them, O = H Mᵀ, give M on the span of H: all of it with as
many independent rows as dimensions, else a projection in which candidates can be compared still.
Source: Schönemann, A generalized solution of the orthogonal Procrustes problem (1966).
"""

import numpy as np

from pipeline.dtypes import Floats
from pipeline.leakage.evidence import Comparison, Pairs, RowByRow, as_they_are

# Of the greatest singular value: directions below say nothing of the matrix, only of rounding.
RELATIVE_RANK = 1e-8


def aligned_bases(pairs: Pairs) -> tuple[Floats, Floats]:
    """Orthonormal [hidden, rank] of the observed span, and what it is in the public one.

    A row r of the model and its observation o agree there: o @ first == r @ second.
    """
    # A few rows of a trained model are hundreds of times longer than the rest.
    scale = np.maximum(np.linalg.norm(pairs.public, axis=1, keepdims=True), 1e-30)
    public, observed = (np.float64(rows) / scale for rows in (pairs.public, pairs.observed))
    left, values, right = np.linalg.svd(observed.T @ public)
    rank = int((values > RELATIVE_RANK * values[0]).sum())
    return left[:, :rank].astype(np.float32), right[:rank].T.astype(np.float32)


def compare_aligned(observed: Floats, pairs: Pairs) -> Comparison:
    """Compare observations with candidates in the span that `pairs` give."""
    seen, meant = aligned_bases(pairs)
    if len(meant) == meant.shape[1]:  # all of the matrix: observations become rows of the model
        return RowByRow(observed @ (seen @ meant.T), as_they_are)
    return RowByRow(observed @ seen, lambda rows: rows @ meant)
