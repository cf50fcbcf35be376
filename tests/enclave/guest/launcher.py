"""Runs a stage inside an enclave under test: the ordinary command, but for the root it believes.

No option of the command can name another root than AWS's. This file is measured with the rest of
the stage, so no image that holds it passes for one that does not.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

import pipeline.agreement.trust_policy
from pipeline.cli.stage_worker import main

# measured with the rest
_ROOT = x509.load_pem_x509_certificate(Path("/stage/test_root.pem").read_bytes())
pipeline.agreement.trust_policy.aws_root = lambda: _ROOT
main()
