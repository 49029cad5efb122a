"""``python -m farshore.cli`` is ``farshore``."""

import sys

from farshore.cli import main

sys.exit(main())
