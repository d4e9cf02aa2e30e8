"""`python -m glocal`: the same as the command `glocal`."""

import sys

from glocal.cli import main

if __name__ == "__main__":  # worker processes import this file again, under another name
    sys.exit(main())
