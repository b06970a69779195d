"""`python -m pyloss`: the command line."""

import sys

from pyloss.cli.parser import main

sys.exit(main(prog="python -m pyloss"))
