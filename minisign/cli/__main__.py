"""``python -m minisign.cli``, and what torchrun starts."""

import sys

from minisign.cli import main

sys.exit(main())
