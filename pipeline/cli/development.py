"""Development mode: what is given up by hand, refused where a manifest demands more."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import model_validator

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import DEV_WARNING, DevTrust
from pipeline.cli.settings import Flag, Settings
from pipeline.errors import InputError
from transport.attestation.dev_authority import default_directory

logger = logging.getLogger(__name__)


class Development(Settings):
    """Whether evidence is of this machine's own making, whatever the manifest pins."""

    dev: Annotated[
        bool,
        Flag(
            None,
            "Development: evidence from a local CA instead of attestation. No privacy from hosts.",
            is_by_hand=True,
        ),
    ] = False
    ignore_measurements: Annotated[
        bool,
        Flag(None, "With --dev: compare no measurement that is pinned.", is_by_hand=True),
    ] = False

    @model_validator(mode="after")
    def _ignores_in_development_alone(self) -> Self:
        if self.ignore_measurements and not self.dev:
            raise InputError("--ignore-measurements goes with --dev; without it they are compared")
        return self

    def trust(self, manifest: Manifest, *, is_told: bool = False) -> DevTrust | None:
        """Development's trust, said loudly unless `is_told` already; None outside of it.

        Raises PolicyError where the manifest demands what development would not look at.
        """
        if not self.dev:
            return None
        trust = DevTrust.for_manifest(
            manifest,
            default_directory(os.environ),
            ignores_measurements=self.ignore_measurements,
        )
        if not is_told:
            logger.warning("event=development_mode %s", DEV_WARNING)
        return trust

    @property
    def marks(self) -> Mapping[str, str]:
        """What every line of status has to say."""
        return {"measurements": "ignored"} if self.ignore_measurements else {}

    def words(self) -> Sequence[str]:
        """The flags as a worker's command line has them."""
        given = (("--dev", self.dev), ("--ignore-measurements", self.ignore_measurements))
        return [flag for flag, is_given in given if is_given]
