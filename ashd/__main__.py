"""`python -m ashd`: the same program as the console script."""

import sys

from ashd.cli import main

sys.exit(main())
