"""Commands in processes of their own, and such as die by themselves at a moment that a test names."""

import signal
import subprocess

from forked import imported
from runs import SAMPLE

COMMAND = "import sys; from fastlm.trainer import cli; sys.exit(cli.main(sys.argv[1:]))"
KILL = f"""
import os, pkgutil, signal, sys
from fastlm.trainer import budget, cli
budget.SAMPLE = {SAMPLE}
where, n, *argv = sys.argv[1:]
owner, _, name = where.rpartition(".")
owner = pkgutil.resolve_name(owner)
real, left = getattr(owner, name), int(n)
def deadly(*args, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
setattr(owner, name, deadly)
sys.exit(cli.main(argv))
"""


WORN = """
import signal, sys
from fastlm.trainer import cli
from fastlm.trainer.commands import cleaning, packing
seconds, *argv = sys.argv[1:]
signal.setitimer(signal.ITIMER_PROF, float(seconds))
sys.exit(cli.main(argv))
"""


def command(*argv: str) -> subprocess.CompletedProcess:
    """`fastlm ARGV`, run to its end."""
    return imported().run(COMMAND, *argv)


def outlived(seconds: float, *argv: str) -> bool:
    """Whether `fastlm data …` came to its end within so many seconds of the processor; if not, the system has ended it
    then and there, wherever it was.
    """
    died = imported().run(WORN, str(seconds), *argv)
    assert died.returncode in (0, -signal.SIGPROF), died.stderr
    return died.returncode == 0


def killed(where: str, n: int, *argv: str) -> None:
    """`fastlm ARGV`, ended by SIGKILL when the function of this name is called for the nth time."""
    died = imported().run(KILL, where, str(n), *argv)
    assert died.returncode == -signal.SIGKILL, died.stderr
