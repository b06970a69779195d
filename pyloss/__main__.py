"""`python -m pyloss`: the command line."""

import sys

from pyloss.cli import main

sys.exit(main(prog="python -m pyloss"))
