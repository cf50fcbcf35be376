"""Rows mixed with each other span what they spanned before: each of them is still in there.

Whatever invertible matrix mixes them, A H has the row space of H. A candidate's row is one of the
text's if none of it is left outside of that space. Norms before a linear scale rows by a factor and
columns by public weights, so that what a linear takes tells the same. Spaces as wide as the model
hold everything, and tell nothing.
"""

import numpy as np

from pipeline.dtypes import Floats
from pipeline.leakage.evidence import Comparison, Evidence, RowByRow

# Of the greatest singular value: directions below are rounding.
RELATIVE_RANK = 1e-6
# Left over of a unit row that is in the space, at most: that of a token at another place is more.
ROUNDING = 1e-2


def row_space(evidence: Evidence) -> Comparison:
    """Compare what is left of candidates' directions outside of the observed space with nothing.

    Of one that is outside that has length 1, whatever its share, and else nearly none.
    """
    observed = np.float64(evidence.observed)
    _, values, directions = np.linalg.svd(observed, full_matrices=False)
    basis = directions[values > RELATIVE_RANK * values[0]].T

    def left_over(rows: Floats) -> Floats:
        units = np.float64(rows)
        units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-30)
        rest = units - (units @ basis) @ basis.T
        rest /= np.linalg.norm(rest, axis=1, keepdims=True) + ROUNDING
        found: Floats = rest.astype(np.float32)
        return found

    return RowByRow(np.zeros_like(evidence.observed), left_over)
