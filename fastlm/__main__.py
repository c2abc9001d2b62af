"""`python -m fastlm` is the command `fastlm`."""

import sys

from fastlm.trainer.cli import main

sys.exit(main())
