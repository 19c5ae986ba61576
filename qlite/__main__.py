"""`python -m qlite`, the same as the command `qlite`."""

import sys

from qlite.cli import main

if __name__ == "__main__":
    sys.exit(main())
