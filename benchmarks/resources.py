"""What every Triton kernel costs a multiprocessor: registers, spills, shared memory, tensor-core instructions. No GPU
needed.

    python benchmarks/resources.py                      # the variants that CI checks
    python benchmarks/resources.py --all --json FILE    # every dtype, head size and term, and the table as JSON

The real launchers are called on tensors without storage, under a Triton driver that stands for a GPU of a given
architecture, compiles what it is asked to launch, and launches nothing: so what is measured here is what runs there.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fastlm.kernels import attention, attention_backward, embedding, gate, logits, norm, rotary
from fastlm.ops.attention import LEARNED, Arguments
from fastlm.ops.logits import Arguments as LossArguments
from fastlm.ops.norm import Arguments as NormArguments
from fastlm.ops.norm import Saved

ARCHITECTURES = (80, 90, 100)
# bytes a block may have; the multiprocessor has 1 KiB more for each block
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
REGISTERS = 65_536
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """One compiled kernel. spills: bytes of stack a thread. blocks: how many fit a multiprocessor.

    instructions: of the GPU, 16 bytes each. tensor_core: PTX instructions that multiply on tensor cores. warp_group:
    these are a whole warp group's (wgmma, sm_90).
    """

    case: str
    kernel: str
    arch: int
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    blocks: int
    instructions: int
    tensor_core: int
    warp_group: bool


class PaperGPU:
    """A Triton driver for a GPU that is not there. `compiled` collects (constants, metadata, PTX, cubin) of what was
    launched.
    """

    def __init__(self, arch: int):
        self.arch = arch
        self.compiled: list[tuple[dict, object, str, bytes]] = []
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": sys.maxsize}
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata) -> Callable:
        self._loading = {source.fn.arg_names[place[0]]: value for place, value in source.constants.items()}, metadata
        return lambda *args: None

    def _load(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        constants, metadata = self._loading
        ptx = get_cache_manager(metadata.hash).get_file(f"{name}.ptx")
        self.compiled.append((constants, metadata, Path(ptx).read_text(), cubin))
        return None, None, 0, 0, 1024


def measure(case: str, arch: int, constants: dict, metadata, ptx: str, cubin: bytes) -> Resources:
    """Read a compiled kernel, its binary by the cuobjdump in Triton's own package."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", "--dump-elf", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spills = (int(re.search(rf"{name}:(\d+)", listing)[1]) for name in ("REG", "STACK"))
    # of the section's row: index, offset, size, …, name
    code = re.search(rf"^\s*[0-9a-f]+\s+[0-9a-f]+\s+([0-9a-f]+) .* \.text\.{metadata.name}$", listing, re.MULTILINE)
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out 256 at a time
    return Resources(
        case, metadata.name.removesuffix("_kernel"), arch,
        "×".join(str(v) for k, v in constants.items() if k in ("BLOCK", "BLOCK_M", "BLOCK_N")),
        metadata.num_warps, metadata.num_stages, registers, spills, metadata.shared,
        blocks=min(
            REGISTERS // (per_warp * metadata.num_warps), (SHARED[arch] + 1024) // (metadata.shared + 1024),
            64 // metadata.num_warps,
        ),
        instructions=int(code[1], 16) // 16,
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        warp_group="wgmma.mma_async" in ptx,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Cases


B, H, HK, L = 2, 8, 4, 4096  # Lq, Lk and the band are run-time numbers to every kernel


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def by_distance(*names: str) -> Callable:
    return lambda dtype, D: {name: empty(H, 2 * L - 1, D, dtype=dtype) for name in names}


def integers(*names: str) -> Callable:
    return lambda dtype, D: {name: empty(B, L, dtype=torch.int32) for name in names}


def bias(sides: str) -> Callable:
    """One that differs along these of batch, heads, queries and keys."""
    shape = lambda: (n if side in sides else 1 for side, n in zip("bhqk", (B, H, L, L), strict=True))
    return lambda dtype, D: {"bias": empty(*shape(), dtype=dtype)}


def rows_beside(name: str, heads: int) -> Callable:
    return lambda dtype, D: {name: empty(B, heads, L, D, dtype=dtype)}


def dropout(dtype: torch.dtype, D: int) -> dict:
    return {"dropout": 0.1, "seed": 1}


def softcap(dtype: torch.dtype, D: int) -> dict:
    return {"softcap": 50.0}


TERMS = {  # name → what gives the arguments beside q, k, v
    "table": [lambda dtype, D: {"table": empty(H, 2 * L - 1, dtype=torch.float32)}],
    "bias of keys": [bias("bk")],
    "bias": [bias("hqk")],
    "dropout": [dropout],
    "softcap": [softcap],
    "lengths, prefix": [lambda dtype, D: {name: empty(B, dtype=torch.int32) for name in ("key_lengths", "prefix")}],
    "segments": [integers("q_segments", "k_segments")],
    "dropout, segments": [dropout, integers("q_segments", "k_segments")],
    "order": [integers("q_ranks", "k_ranks")],
    "shaw": [by_distance("query_vectors", "value_vectors")],
    "transformer-xl": [by_distance("query_vectors"), rows_beside("q_position", H)],
    "deberta": [by_distance("query_vectors", "key_vectors"), rows_beside("k_position", HK)],
    "xlnet": [
        by_distance("query_vectors"), rows_beside("q_position", H),
        integers("q_ranks", "k_ranks", "q_groups", "k_groups"),
        lambda dtype, D: {"same": empty(B, H, L, dtype=torch.float32)},
    ],
}  # fmt: skip


def attention_case(dtype: torch.dtype, D: int, term: str | None = None, wanted: set[str] | None = None) -> Callable:
    """Launch forward and backward, causal, for 8 heads on 4 key heads at 4096 positions.

    wanted: which gradients; None for those of all that is given.
    """

    def launch() -> None:
        given = {}
        for give in TERMS[term] if term else ():
            given |= give(dtype, D)
        q, k, v = (empty(B, heads, L, D, dtype=dtype) for heads in (H, HK, HK))
        a = Arguments.of(q, k, v, right=0, **given)
        out, lse = attention.forward(a)
        given = {name for name in LEARNED if getattr(a, name) is not None}
        attention_backward.backward(out, None, out, lse, a, given if wanted is None else wanted)

    return launch


def decoding_case(dtype: torch.dtype, D: int, term: str) -> Callable:
    """Launch the forward pass of one query for each of 32 heads, on 8 key heads of 8192 positions. term: names."""

    def launch() -> None:
        q, k, v = (empty(1, *shape, D, dtype=dtype) for shape in ((32, 1), (8, 8192), (8, 8192)))
        given = {"table": empty(32, 8192, dtype=torch.float32), "key_lengths": empty(1, dtype=torch.int32)}
        attention.forward(Arguments.of(q, k, v, **{name: x for name, x in given.items() if name in term}))

    return launch


def rotate_case(dtype: torch.dtype, D: int, R: int, layout: str) -> Callable:
    def launch() -> None:
        x, angle = torch.empty(2, 8, 4096, D, dtype=dtype, device="meta"), torch.empty(4096, R // 2, device="meta")
        rotary.rotate(x, angle, angle, layout)

    return launch


def norm_case(dtype: torch.dtype, D: int) -> Callable:
    """Launch layer norm with a residual, and its gradient."""

    def launch() -> None:
        x, weight = empty(L, D, dtype=dtype), empty(D, dtype=dtype)
        _, s, statistics = norm.forward(NormArguments(x, x, weight, weight, 1e-5, 0.0, False), centred=True)
        norm.backward(Saved(x, x, s, statistics, weight, 0.0, True))

    return launch


def gate_case(dtype: torch.dtype, activation: str) -> Callable:
    """Launch the gated activation of 2,048 channels, and its gradient."""

    def launch() -> None:
        x = empty(L, 4096, dtype=dtype)
        gate.gated_backward(gate.gated(x, activation), x, activation)

    return launch


def embedding_case(dtype: torch.dtype, D: int) -> Callable:
    """Launch the gradient of an embedding of 32,000 tokens."""
    return lambda: embedding.backward(empty(L, D, dtype=dtype), empty(L, dtype=torch.int64), 32_000, -1)


def logits_case(dtype: torch.dtype, V: int, options: bool) -> Callable:
    """Launch what measures rows of V words, their gradient, and both in one. options: with bias, softcap, smoothing."""

    def launch() -> None:
        x, of_rows = empty(L, -(-V // 64) * 64, dtype=dtype)[:, :V], empty(L, dtype=torch.float32)
        weight, labels = empty(V, 0, dtype=dtype), empty(L, dtype=torch.int64)
        bias, smoothing, softcap = (empty(V, dtype=dtype), 0.1, 30.0) if options else (None, 0.0, 0.0)
        a = LossArguments(x, weight, bias, labels, -100, smoothing, 1e-4, softcap, 1.0, 0, V, "")
        logits.measure(x, labels, a)
        logits.gradient(x, labels, 3 * (of_rows,), a)
        logits.lose(x, labels, a)

    return launch


BY_TERM = ((torch.bfloat16, 64), (torch.bfloat16, 128))  # where every term is compiled
# by CI, for time: they hold all the others do
FEW = ("bias", "softcap", "dropout, segments", "shaw", "deberta", "xlnet")
SAME_TILES = ("shaw", "deberta", "xlnet", "half", "interleaved", "norm", "gated", "embedding", "logits")  # on every GPU


def cases(everything: bool) -> Iterator[tuple[str, Callable]]:
    """(name, launch): what CI checks, or every dtype, head size, term and layout."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if everything else (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for D in (32, 64, 80, 96, 128, 256) if everything else (64, 128):
            terms = (
                (None, "table")
                if (dtype, D) not in BY_TERM
                else (None, *TERMS)
                if everything
                else (None, "table", *FEW)
                if D == 64
                else (None, "table")
            )
            for term in terms:
                yield f"{name} D={D}{f' {term}' if term else ''}", attention_case(dtype, D, term)
            for term in ("", "table", "table, key_lengths") if everything else ("table",):
                yield f"{name} D={D}{f' {term}' if term else ''} decoding", decoding_case(dtype, D, term)
        for layout in ("half", "interleaved"):
            for R in (128, 32) if everything else (128,):
                yield f"{name} D=128 R={R} {layout}", rotate_case(dtype, 128, R, layout)
        for D in (64, 768, 1024, 4096, 8192, 16384) if everything else (768, 8192):
            yield f"{name} D={D} norm", norm_case(dtype, D)
        for activation in ("gelu", "gelu_tanh", "relu", "silu", "tanh") if everything else ("silu", "tanh"):
            yield f"{name} {activation} gated", gate_case(dtype, activation)
        yield f"{name} D=768 embedding", embedding_case(dtype, 768)
        for V in (1024, 50257) if everything else (50257,):
            yield f"{name} V={V} logits", logits_case(dtype, V, False)
            yield f"{name} V={V}, all options logits", logits_case(dtype, V, True)


def report(architectures: tuple[int, ...], everything: bool) -> Iterator[Resources]:
    """Compile every case for every architecture; but for CI, what has the same tiles on every GPU for the first and, in
    turn, for one of the others. A kernel that a case shares with an earlier one is listed once.
    """
    first, *others = architectures
    for arch in architectures:
        gpu = PaperGPU(arch)
        driver.set_active(gpu)
        for i, (case, launch) in enumerate(cases(everything)):
            once_more = others[i % len(others)] if others else first
            if (
                not everything
                and (case.endswith(SAME_TILES) or case.startswith("float32"))
                and arch not in (first, once_more)
            ):
                continue
            launch()
            for compiled in gpu.compiled:
                yield measure(case, arch, *compiled)
            gpu.compiled.clear()


WIDTHS = {
    "arch": 4, "case": 31, "kernel": 17, "tile": 7, "num_warps": 9, "num_stages": 10, "registers": 9, "spills": 6,
    "shared": 7, "blocks": 6,
    "instructions": 12, "tensor_core": 11,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="every dtype, head size and layout")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    print(f"Triton {triton.__version__}")
    print(" ".join(f"{name:>{width}}" for name, width in WIDTHS.items()))
    kernels = []
    for resources in report(tuple(options.arch), options.all):
        kernels.append(asdict(resources))
        print(" ".join(f"{kernels[-1][name]:>{width}}" for name, width in WIDTHS.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    main()
