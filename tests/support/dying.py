"""`fastlm data` in a process that dies by itself, before or after a file has its name."""

import os
import signal
import subprocess
import sys

CODE = """
import os, signal, sys
from fastlm.trainer import cli, disk
left, flush = int(os.environ["AT"]), disk.flush
def counted(path):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)
disk.flush = counted
sys.exit(cli.main(["data", *sys.argv[1:], "--processes", "1"]))
"""


def killed(at: int, *asked: str) -> None:
    """Run the command up to its at-th call of fsync, where SIGKILL ends it."""
    environment = os.environ | {"AT": str(at)}
    done = subprocess.run([sys.executable, "-c", CODE, *asked], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
