"""`python -m jaxalign`, the same as `jaxalign`."""

import sys

from jaxalign.cli import main

sys.exit(main())
