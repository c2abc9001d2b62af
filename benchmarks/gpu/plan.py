"""What runs on a borrowed GPU, in which order and within which time: four calls of under ten minutes, complete each by
itself. `rehearse.py` shows that every block fits.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "benchmarks" / "gpu"
sys.path.insert(0, str(HERE.parent))
sys.path.append(str(ROOT))  # a checkout built in place, unless fastlm is installed
from shapes import Attention, Loss, gpu_attention  # noqa: E402

from fastlm.kernels.tiles import Tiles  # noqa: E402

TOTAL = 570  # seconds that a call may take
GRACE = 15  # seconds between asking a block to stop and ending it
PROCESSES = 12  # that share what compiles: tests, and kernels ahead of the blocks that time them
LIMITS = {"rounds": 10, "budget": 1.5}  # of each comparison (timing.compare)
TUNED_LENGTH = 2048  # at which FlexAttention is also timed as max-autotune chooses


@dataclass(frozen=True)
class Block:
    """Commands that run beside one another, within `cap` seconds; `tail` lines of each one's log are shown."""

    name: str
    cap: int
    commands: list[list[str]]
    tail: int


def calls(out: Path, smoke: bool) -> dict[str, list[Block]]:
    """Name → blocks. smoke: no build, no tests, tiny sizes."""
    python, extra = sys.executable, ["--smoke"] * smoke
    tests = [
        str(ROOT / "tests" / name)
        for name in (
            "csrc/test_cuda.py", "csrc/test_cuda_attention.py", "kernels/test_triton.py",
            "kernels/test_logits_kernels.py",
        )
    ]  # fmt: skip
    pytest = [python, "-m", "pytest", "-q", "-ra", "--maxfail=4", "-p", "no:cacheprovider", *tests]
    shared = lambda command: [[*command, f"{i}/{PROCESSES}"] for i in range(PROCESSES)]
    timed = lambda name, cap, tail: Block(
        name, cap, [[python, str(HERE / "blocks.py"), name, str(out), str(cap - 2 * GRACE), *extra]], tail
    )
    build = [] if smoke else [Block("build", 85, [[python, "setup.py", "build_ext", "--inplace"]], 3)]
    ahead = lambda what, cap: [] if smoke else [Block("ahead", cap, shared([python, str(HERE / "ahead.py"), what]), 1)]
    machine = timed("machine", 40, 20)
    return {
        "correctness": [] if smoke else [*build, machine, Block("tests", 400, shared([*pytest, "--part"]), 12)],
        "attention": [*build, machine, *ahead("attention", 80), timed("attention", 340, 30)],
        "optimizers": [
            *build, machine, timed("optimizers", 250, 30), *ahead("tiles", 65), timed("tiles", 90, 40),
        ],
        "loss": [*build, machine, timed("loss", 300, 30)],
    }  # fmt: skip


LENGTHS = (2048, 16384, 512)  # by value: what people train at first, then what shows how time grows
SPARE_LENGTHS = (8192, 4096, 1024)  # for what time is left


def attention_problems(lengths: tuple[int, ...] = LENGTHS) -> list[Attention]:
    """Biased before plain."""
    schemes = ("t5", "alibi", "none")
    return [gpu_attention(scheme, L, D) for L in lengths for D in (64, 128) for scheme in schemes]


# kernel → head size → tiles to try on sm_90 beside those of kernels/tiles.py, none of which spills much there
TILES: dict[str, dict[int, list[Tiles]]] = {
    "forward": {
        64: [Tiles(128, 128, 8, 2, maxnreg=128), Tiles(128, 64, 4, 3), Tiles(64, 128, 4, 2), Tiles(128, 64, 8, 2)],
        128: [Tiles(128, 64, 8, 2, maxnreg=128), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 2)],
    },
    "dq": {
        64: [Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 4, 2)],
        128: [Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 3)],
    },
    "dkdv": {
        64: [Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 3)],
        128: [Tiles(64, 128, 8, 3), Tiles(64, 64, 8, 2), Tiles(32, 128, 8, 2)],
    },
    "table": {
        64: [Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 2)],
        128: [Tiles(128, 64, 8, 1), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 1)],
    },
}


def tile_problems() -> list[tuple[str, Attention]]:
    """(kernel, problem) that candidates of TILES are timed on: T5's bias, which uses every kernel."""
    return [(kernel, gpu_attention("t5", TUNED_LENGTH, D)) for D in (64, 128) for kernel in TILES]


def loss_problems() -> list[Loss]:
    """GPT-2-small's, Llama 2's and 3's of 7 and 8 billion, BERT-base's with hidden tokens alone, Gemma 2's of 2."""
    of = lambda N, V, D, targets=1.0: Loss(N, V, D, torch.bfloat16, targets)
    return [
        of(16384, 50257, 768), of(16384, 128256, 4096), of(16384, 32000, 4096), of(16384, 30522, 768, 0.15),
        of(8192, 256000, 2304),
    ]  # fmt: skip


def smoke_problems() -> list[Attention]:
    return [Attention(scheme, 2, 2, 32, 16, torch.float32) for scheme in ("t5", "alibi", "none")]


SMOKE_LOSSES = [Loss(32, 50, 16, torch.float32), Loss(32, 50, 16, torch.float32, 0.5)]
