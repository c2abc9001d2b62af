"""Builds of the package in folders of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def built(folder: Path, **environment: str) -> Path:
    """Build under this environment; returns the folder to put on the path."""
    lib = folder / "lib"
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "base"), "--build-lib", str(lib)]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True, text=True)
    return lib
