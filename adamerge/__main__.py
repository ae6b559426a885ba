"""``python -m adamerge``."""

import sys

from adamerge.cli import main

sys.exit(main())
