"""``python -m minisign``."""

import sys

from minisign.cli import main

sys.exit(main())
