"""`python -P -m enclave`."""

import sys

from enclave.cli import main

sys.exit(main())
