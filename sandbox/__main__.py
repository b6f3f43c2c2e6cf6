"""``python -m sandbox``: the command ``sandbox``."""

import sys

from sandbox.cli import main

sys.exit(main())
