"""Runs the command line: ``python -m fxhybrid`` is ``fxhybrid``."""

from __future__ import annotations

import sys

from fxhybrid.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
