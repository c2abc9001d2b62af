"""CUDA kernels without a GPU: what the compiler made of them for every target, and their logic on the host under
sanitizers.

Reads the library that setup.py built. A machine without nvcc skips what needs it; a build that failed where nvcc is
there is an error.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastlm.backends import native

TESTS = Path(__file__).parent
CUDA = torch.device("cuda")
TYPES = ("NS_4bf16E", "NS_3f16E")  # as compilers write them
TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")
KERNELS = (
    "ApplyAdamW",
    "ApplySgd",
    "ApplyMomentum",
    "LambMoments",
    "lamb_ratio",
    "LambApply",
    "advance",
    "Unscale",
    "SumOfSquares",
    "finish",
)
KERNELS += ("adafactor_measure", "adafactor_columns", "adafactor_finish", "adafactor_bounded", "adafactor_apply")
SPILLED = {"forward": 0, "dq": 64, "dkdv": 64, "table": 64}
# of attention: kernel, dtype and head size → bytes of stack that it may take, into which registers spill
SPILLS = {f"attention_{name}": 0 for name in ("segments", "delta", "table_sum")}
SPILLS |= {
    f"attention_{name}I{dtype}Li{D}E": most for name, most in SPILLED.items() for dtype in TYPES for D in (64, 128)
}


@pytest.fixture(scope="module")
def library() -> Path:
    why = native.cuda_missing(CUDA)
    if why is not None:
        (pytest.fail if shutil.which("nvcc") and native.build_report() else pytest.skip)(why)
    return Path(native.cuda().__file__)


def cuobjdump(*arguments) -> str:
    """The output of NVIDIA's cuobjdump: the toolkit's, or the one in Triton's package."""
    try:
        import triton.backends.nvidia as nvidia

        bundled = [str(Path(path) / "bin") for path in nvidia.__path__]
    except ImportError:
        bundled = []
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(bundled))
    if tool is None:
        pytest.skip("cuobjdump was found neither in PATH nor in Triton's package")
    return subprocess.run([tool, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def resources(library) -> list[tuple[str, str, int, int]]:
    """(target, kernel, registers, bytes of stack and local memory) of every kernel."""
    found = re.findall(
        r"arch = (\w+)|Function (\w+):|REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", cuobjdump("-res-usage", library)
    )
    rows, target, kernel = [], "", ""
    for arch, function, registers, stack, local in found:
        target, kernel = arch or target, function or kernel
        if registers:
            rows.append((target, kernel, int(registers), int(stack) + int(local)))
    return rows


def test_no_optimizer_spills(resources):
    """Registers only, no stack, on every target; and few enough registers for three blocks on a processor, whose loads,
    up to 16 bytes of five lists for each of 768 threads, cover the wait for memory.
    """
    rows = [row for row in resources if "attention_" not in row[1]]
    for target, kernel, registers, stack in rows:
        assert stack == 0, f"{kernel} for {target} uses {stack} bytes of stack and local memory"
        assert registers <= 80, f"{kernel} for {target} uses {registers} registers"
    seen = {(target, name) for target, kernel, *_ in rows for name in KERNELS if name in kernel}
    assert seen == {(target, name) for target in TARGETS for name in KERNELS}


def test_attention_spills_little(resources):
    """Nothing forward; a few words in walks of the backward pass."""
    seen = set()
    for target, kernel, _registers, stack in resources:
        for name in (name for name in SPILLS if name in kernel):
            seen.add((target, name))
            assert stack <= SPILLS[name], f"{kernel} for {target} uses {stack} bytes of stack and local memory"
    assert seen == {(target, name) for target in TARGETS for name in SPILLS}


def test_attention_on_tensor_cores(library):
    """Products by HMMA alone, tiles by ldmatrix and asynchronous copies of 16 bytes, no generic access."""
    functions = re.split(r"Function : ", cuobjdump("-sass", "-arch", "sm_80", library))
    for name in ("forward", "dq", "dkdv", "table"):
        (code,) = (f for f in functions if f"attention_{name}INS_4bf16ELi64E" in f.splitlines()[0])
        for instruction in (r"HMMA\.16816\.F32\.BF16", r"LDSM\.16\.M88\.4", r"LDGSTS\.E\.BYPASS\.128"):
            assert re.search(instruction, code), f"attention_{name} has no {instruction}"
        assert not re.search(r"\b(LD\.E|ST\.E|ATOM|RED)\b", code)


def test_vector_loads_and_stores(library):
    """On sm_90a AdamW's loop has a 16-byte load for each of p, g, m, v and a store for p, m, v, of 8 bytes where all
    are bf16; Adafactor's last pass has them for two vectors of p and g at a time; no generic or local access.
    """
    functions = re.split(r"Function : ", cuobjdump("-sass", "-arch", "sm_90a", library))
    names = (
        *(f"each_chunkILj{dtypes}ELi4ENS_10ApplyAdamWILNS_9PrecisionE0E" for dtypes in (0, 0b01_01_01_01, 2**32 - 1)),
        "SumOfSquares",
        "adafactor_measureILNS_9PrecisionE0E",
        "adafactor_applyILNS_9PrecisionE0ELb0E",
    )
    codes = [next(f for f in functions if name in f.splitlines()[0]) for name in names]
    adamw, bf16, any_mix, squares, _measure, apply = codes
    count = lambda code, name: len(re.findall(rf"\b{re.escape(name)}\b", code))
    for code in (adamw, any_mix):
        assert (count(code, "LDG.E.128"), count(code, "STG.E.128")) == (4, 3)
    for name, more in (("LDG.E.64", 4), ("STG.E.64", 3), ("LDG.E.128", -4), ("STG.E.128", -3)):
        assert count(bf16, name) - count(adamw, name) == more, name
    assert (count(apply, "LDG.E.128"), count(apply, "STG.E.128")) == (4, 2)
    assert count(squares, "LDG.E.128") == 4
    for code in codes:
        assert not re.search(r"\b(LDL|STL|LD\.E|ST\.E)\b", code)


@pytest.mark.parametrize("source", ["multi_tensor", "panels"])
def test_logic_on_the_host(source, tmp_path):
    """Chunks, panels and strips cover every element once and so does the loop over a chunk, whatever sizes, dtypes and
    alignment; sums of squares hold from subnormals to the largest fp32; Adafactor's passes do what the formulas say.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("neither g++ nor clang++ was found")
    program = tmp_path / source
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        "-g1",
        "-O0",  # of which compiling takes half, and running no more than that
        "-ffp-contract=off",
    ]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *sanitizers, str(TESTS / f"{source}.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_a_launch_without_a_driver_says_so(library):
    one = torch.ones(4).data_ptr()
    for launch in _launches(native.cuda(), one):
        with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            launch()


def update(m, at, params=None, masters=(), keys=(), steps=None):
    """Of one tensor at an address, fp32 unless other parameters are given."""
    one = [(at, 0)]
    return m.Update(params or one, list(masters), list(keys), one, [at] if steps is None else steps, 0, 0)


def adafactor(m, lr=1e-3):
    return m.AdafactorOptions(lr, False, 0, 0.8, 0, 1e-30, 0, 1e-3, True, 1, 1, 0, 0, True)


def adam(m):
    return m.AdamOptions(1e-3, 0.9, 0.99, 1e-8, 0.1, 1, True)


def _launches(m, at):
    tensors = [(at, 0)]
    return (
        lambda: m.unscale(tensors, [4], at, at, 0, 0),
        lambda: m.grad_stats(tensors, [4], 0, 1.0, at, at, 0, 0),
        lambda: m.adamw(update(m, at), [4], tensors, tensors, adam(m), at, 0, 0),
        lambda: m.lamb(
            update(m, at), [4], tensors, tensors, adam(m), m.RatioOptions(True, False, 0, 9, 0, 9), at, 0, 0
        ),
        lambda: m.sgd(update(m, at), [4], [], m.SgdOptions(1e-3, 0, 0, 0, False), at, 0, 0),
        lambda: m.adafactor(update(m, at), [(1, 2, 2)], [at], [at], [], adafactor(m), at, 0, 0),
        # 16-bit remainders
        lambda: m.adamw(update(m, at, [(at, 1)], [(at, 3)]), [4], tensors, tensors, adam(m), at, 0, 0),
        lambda: m.attention(*attention(at)),
        lambda: m.attention_backward(*attention_backward(at)),
    )


def attention(at, D=8, dtype=1, k=None, terms=None, band=(9, 9, 0), scale=1.0, strides=(64, 32, 8, 1)):
    """Arguments of one query and one key at an address, bf16."""
    q = at, (1, 1, 1, D), strides
    return q, k or q, k or q, dtype, terms or {}, band, scale, at, at, at, 0, 0


def attention_backward(at, **changes):
    q, k, v, dtype, terms, band, scale, out, lse, *where = attention(at, **changes)
    return q, 0, q, k, v, dtype, terms, band, scale, out, lse, at, at, at, 0, *where


def test_launchers_refuse_in_words(library):
    """Checks come before the first CUDA call, so they need no driver."""
    m, at = native.cuda(), 256
    for tensors, sizes, message in (
        ([(at, 0)], [4, 4], "grads has 1 tensors for 2 sizes"),
        ([(at, 0)], [-1], "a size is negative"),
        ([(0, 0)], [4], "grads holds a null address"),
        ([(at, 3)], [4], "grads holds a dtype that is not fp32, bf16 or fp16"),
        ([(at + 2, 0)], [4], "grads holds an address that is not a multiple of its element's size"),
    ):
        with pytest.raises(ValueError, match=message):
            m.unscale(tensors, sizes, at, at, 0, 0)
    with pytest.raises(ValueError, match="factor and found_inf must be given"):
        m.unscale([(at, 0)], [4], 0, at, 0, 0)
    with pytest.raises(ValueError, match="workspace is null"):
        m.grad_stats([(at, 0)], [4], 0, 1.0, at, 0, 0, 0)
    state = [[(at, 0)]] * 2
    for masters, keys, steps, workspace, message in (
        ((), (), [], at, "steps and params differ in number"),
        ((), (), [at], 0, "workspace is null"),
        ((), (), [0], at, "steps holds a null address"),
        ([(at, 0)], (), [at], at, "masters are fp32 of 16-bit parameters, or int16 remainders of bf16"),
        ((), [7], [at], at, "stochastic rounding is for bf16 parameters without master"),
    ):
        with pytest.raises(ValueError, match=message):
            m.adamw(update(m, at, None, masters, keys, steps), [4], *state, adam(m), workspace, 0, 0)
    for rows, columns, shape, message in (
        ([at], [], (1, 2, 2), "factors and params differ in number"),
        ([at], [0], (1, 2, 2), "a factor has a null address"),
        ([at], [at], (1, -2, 2), "a size is negative"),
        ([at], [at], (1, 2, 2**27 + 1), "over 2²⁷ columns"),
        ([at], [at], (2**20, 2**11, 2), "or 2³⁰ rows"),
    ):
        with pytest.raises(ValueError, match=message):
            m.adafactor(update(m, at), [shape], rows, columns, [], adafactor(m), at, 0, 0)


def test_attention_refuses_in_words(library):
    at = 256
    key = lambda *shape, at=at: (at, shape, (64, 32, 8, 1))
    for changes, message in (
        (dict(D=12), "the head dimension is 12; served are multiples of 8 up to 128"),
        (dict(dtype=0), "the dtype must be fp16 or bf16"),
        (dict(scale=0.0), "scale is 0.000000; served are positive scales"),
        (dict(k=key(1, 1, 1, 16)), "k does not have the shape that q implies"),
        (dict(k=key(1, 1, 1, 8, at=at + 8)), "k is not at a multiple of 16 bytes"),
        (dict(k=key(1, 0, 1, 8)), "query heads must be a multiple of key heads"),
        (dict(k=(at, (1, 1, 2, 8), (64, 32, 12, 1))), "k must have its rows at multiples of 16 bytes: a stride is 12"),
        (dict(k=(at, (1, 1, 2, 8), (64, 32, 8, 2))), "k must have its channels side by side: the last stride is 2"),
        (dict(band=(-2, 1, 0)), "the band is empty"),
        (dict(band=(0, 0, 2**31)), "beyond 2²⁹"),
        (dict(terms={"bias": at}), "bias is not served"),
        (dict(terms={"q_segments": at}), "segments must be given for queries and keys"),
    ):
        for launch, arguments in (
            (native.cuda().attention, attention),
            (native.cuda().attention_backward, attention_backward),
        ):
            with pytest.raises(ValueError, match=message):
                launch(*arguments(at, **changes))


def test_the_workspace_of_adafactor(library):
    """Of the largest group of tensors, and for each a rule; the sums of a matrix's panels are the most of it, about a
    byte an element.
    """
    workspace = native.cuda().adafactor_workspace
    assert workspace([]) == 0
    block = [(1, 768, 768), (1, 768, 0)]
    assert 0 < workspace(100 * block) < 2 * 2**23 * 0.5
    assert workspace(100 * block) - workspace(99 * block) < 200
    assert 2**24 * 0.9 < workspace([(1, 2048, 8192)]) < 2**24 * 1.3
