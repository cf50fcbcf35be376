"""The server has the weights it computes with, and the public ones that they were made of."""

from pipeline.leakage.attacks.least_squares import compare_aligned
from pipeline.leakage.evidence import Comparison, Evidence


def known_weights(evidence: Evidence) -> Comparison:
    """Solve for the secret matrix: what reads a row in public, and what reads its observation."""
    return compare_aligned(evidence.observed, evidence.readers)
