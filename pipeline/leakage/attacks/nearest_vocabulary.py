"""The observation is the hidden state itself: the token is the one whose state is nearest."""

from pipeline.leakage.evidence import Comparison, Evidence, RowByRow, as_they_are


def nearest_vocabulary(evidence: Evidence) -> Comparison:
    """Compare observations with candidates' states as they are."""
    return RowByRow(evidence.observed, as_they_are)
