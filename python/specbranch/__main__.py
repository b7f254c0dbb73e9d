"""`python -m specbranch`."""

import sys

from specbranch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
