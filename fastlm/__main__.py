"""`python -m fastlm` is the command `fastlm`."""

import sys

from fastlm.cli import main

sys.exit(main())
