"""The last transformers before 5, in a process of its own: its door, and its models swapped.

FASTLM_TRANSFORMERS_4 names a folder that holds it; .ci/run makes one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("test_door.py", "test_weights.py", "test_heads_of_theirs.py", "swap")
# without the working directory, whose fastlm is not built where another is installed, and without the package of the
# name kernels, which transformers 5 came with and asks for a newer huggingface_hub
RUN = "import sys; del sys.path[0]; sys.modules['kernels'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def test_tests_pass_with_it():
    folder = os.environ.get("FASTLM_TRANSFORMERS_4")
    if folder is None:
        pytest.skip(
            "FASTLM_TRANSFORMERS_4 is unset; pip install --no-deps --target FOLDER transformers==4.57.6 "
            "tokenizers==0.22.2 huggingface_hub==0.36.2, and set it to FOLDER"
        )
    assert (Path(folder) / "transformers").is_dir()
    command = [sys.executable, "-c", RUN, "-q", "-n", "0", "-p", "no:cacheprovider", *(str(HERE / f) for f in FILES)]
    paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
