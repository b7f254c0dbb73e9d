"""`python -m specbranch.cli`."""

import sys

from specbranch.cli.main import main

sys.exit(main())
