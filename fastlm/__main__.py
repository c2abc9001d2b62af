"""The command `fastlm`, and `python -m fastlm`. The first signal may come while torch is still being imported."""

import sys

from fastlm.trainer.signals import end_at_once


def main() -> int:
    """Run one command; return the exit status."""
    end_at_once()
    from fastlm.trainer import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
