"""Programs in processes of their own, without the seconds that PyTorch's import takes: each is forked from a process
that has imported the packages below, and nothing of fastlm, and is otherwise run as `python -P -c` runs it: without the
folder where it starts, which may be a checkout that is not built beside the package that is installed.
"""

import atexit
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

PACKAGES = ("torch", "torch._dynamo", "numpy", "safetensors.torch", "tokenizers", "tyro", "matplotlib.figure")
PATIENCE = 120.0  # seconds for one program


class Imported:
    """A process that has imported PACKAGES, and waits for programs to run.

    options: of the interpreter, such as "-W", "error".
    """

    def __init__(self, *options: str):
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(PATIENCE)
        command = [sys.executable, *options, __file__]
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # a fork has no threads but its own
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, env=os.environ | alone)
        self._answers = self._channel.makefile()
        atexit.register(self.stop)

    def run(self, code: str, *argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        """Run code where the caller is, with its environment or another."""
        with tempfile.TemporaryDirectory() as folder:
            said = [str(Path(folder) / name) for name in ("stdout", "stderr")]
            asked = (code, list(map(str, argv)), os.getcwd(), dict(os.environ if env is None else env), said)
            self._channel.sendall(json.dumps(asked).encode() + b"\n")
            status = int(self._answers.readline())
            return subprocess.CompletedProcess(code, status, *(Path(path).read_text() for path in said))

    def stop(self) -> None:
        self._channel.shutdown(socket.SHUT_RDWR)
        self._process.wait()


@cache
def imported(*options: str) -> Imported:
    """The one process with these options."""
    return Imported(*options)


def _next() -> str:
    """Wait for programs; return, in a new process that is otherwise as this one is, the code of each."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code, argv, folder, environment, said = json.loads(line)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            for number, path in enumerate((os.devnull, *said)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            sys.argv = ["-c", *argv]
            return code
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


if __name__ == "__main__":
    del sys.path[0]  # this folder
    for package in PACKAGES:
        if importlib.util.find_spec(package.split(".")[0]) is not None:
            importlib.import_module(package)
    exec(_next(), {"__name__": "__main__"})
