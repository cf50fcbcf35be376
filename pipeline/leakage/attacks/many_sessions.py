"""One secret over many sessions, or one text sent many times under fresh noise."""

from pipeline.leakage.attacks.least_squares import compare_aligned
from pipeline.leakage.evidence import Comparison, Evidence, RowByRow, as_they_are


def shared_secret(evidence: Evidence) -> Comparison:
    """Regress the secret matrix on other sessions whose text is known."""
    return compare_aligned(evidence.observed, evidence.other_sessions)


def averaged_noise(evidence: Evidence) -> Comparison:
    """Average what was observed of the same text: noise shrinks with the root of the sessions."""
    return RowByRow(evidence.repeated.mean(axis=0), as_they_are)
