"""How much noisy rows may tell in all: the user's bound, where the manifest has noise added."""

import sys

from pipeline.agreement.manifest import Manifest
from pipeline.cli.logs import tell
from pipeline.codecs.privacy_budget import PrivacyBudget
from pipeline.errors import InputError

DEFAULT_EPSILON = 2.0
DEFAULT_DELTA = 1e-5


def privacy_budget(
    manifest: Manifest, epsilon: float | None, delta: float | None
) -> PrivacyBudget | None:
    """The session's budget by `--dp-epsilon` and `--dp-delta`; None where no noise is added.

    Raises InputError.
    """
    if manifest.dp is None:
        # Attack: a manifest without noise, for a user who believes in it.
        for flag, value in (("--dp-epsilon", epsilon), ("--dp-delta", delta)):
            if value is not None:
                raise InputError(
                    f"{flag} {value:g}: this manifest adds no noise, so that nothing is bounded; "
                    "`pipeline-orch plan --dp-sigma` writes one that does"
                )
        return None
    if epsilon is None and not sys.stderr.isatty():
        raise InputError(
            "--dp-epsilon: the manifest adds noise, and nobody sees here what it amounts to; "
            "without a terminal give the bound"
        )
    return PrivacyBudget(
        manifest.dp.sigma,
        manifest.dp.clip,
        DEFAULT_EPSILON if epsilon is None else epsilon,
        DEFAULT_DELTA if delta is None else delta,
    )


def tell_prompt(budget: PrivacyBudget, num_prompt: int, max_tokens: int) -> None:
    """Show what a prompt and its continuation amount to, before anything is sent."""
    whole = num_prompt + max_tokens - 1  # the last token does not go back
    told = f"the prompt's {budget.describe(num_prompt)}; with up to {max_tokens} tokens "
    told += f"epsilon {budget.composed_epsilon(whole):.4g}; the bound is {budget.epsilon:g}"
    if whole > budget.max_rows:
        told += f", so that the text ends after {budget.max_rows + 1 - num_prompt} tokens"
    tell("pipeline-orch", told)
