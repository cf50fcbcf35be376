"""The first tokens of a text are known: a greeting, a form, a system prompt everybody has."""

from pipeline.leakage.attacks.least_squares import compare_aligned
from pipeline.leakage.evidence import Comparison, Evidence, Pairs


def known_prefix(evidence: Evidence) -> Comparison:
    """Regress the secret matrix on the known rows."""
    known = evidence.known
    return compare_aligned(evidence.observed, Pairs(known, evidence.observed[: len(known)]))
