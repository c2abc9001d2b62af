"""The CUDA list ops on a GPU: against the definition and, bit for bit, against the C++ backend, which shares their
rule.

Sizes straddle what the kernels treat apart: vectors of 4, chunks of 16384, batches of hundreds of tensors.
"""

import itertools
import math

import pytest
import torch
from cases import ADAFACTOR, ADAMW, LAMB, SGD

from fastlm import amp, optim
from fastlm.backends import native
from fastlm.backends.dispatch import OPS, use_backend
from fastlm.ops.optim.adamw import CORRECTIONS, AdamOptions, adamw
from fastlm.ops.optim.unscale import grad_stats, unscale

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no GPU, or a CPU build of torch"
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [1, 0, 3, 4, 5, 1023, 16383, 16384, 16385, 100003, 0]
MIXES = {  # dtypes of p, g, m, v
    "fp32": (F32, F32, F32, F32),
    "bf16": (BF16, BF16, BF16, BF16),
    "fp16": (F16, F16, F16, F16),
    "bf16-grads": (F32, BF16, F32, F32),
    "fp32-moments": (BF16, BF16, F32, F32),
    "fp16-scaled": (F16, F16, F32, F32),
    "all-different": (BF16, F16, F32, BF16),
}
OPTIONS = AdamOptions(1e-2, 0.9, 0.95, 1e-8, 0.1, CORRECTIONS["moments"], decoupled=True)


@pytest.fixture(autouse=True)
def cuda_backend():
    missing = native.cuda_missing(CUDA)
    if missing:
        pytest.fail(missing)
    with use_backend("cuda"):
        yield


def tensors(sizes, dtype, seed=0, shift=0) -> list[torch.Tensor]:
    """Normal numbers on the CPU. shift: elements past the start of their memory, to spoil alignment."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n + shift, generator=g).to(dtype)[shift:] for n in sizes]


def state(sizes=SIZES, mix="fp32", shift=0, step=3.0) -> list[list[torch.Tensor]]:
    """[params, masters (none), keys (none), grads, exp_avgs, exp_avg_sqs, steps] on the CPU."""
    lists = [tensors(sizes, dtype, seed, shift) for seed, dtype in enumerate(MIXES[mix])]
    lists[3] = [v.abs() for v in lists[3]]
    return [lists[0], [], [], *lists[1:], [torch.tensor(step + i % 3) for i in range(len(sizes))]]


def to(lists, device) -> list[list[torch.Tensor]]:
    """Copies that keep the offset into their memory, which decides their alignment."""
    room = lambda t: torch.empty(t.numel() + t.storage_offset(), dtype=t.dtype, device=device)[t.storage_offset() :]
    return [[room(t).view(t.shape).copy_(t) for t in ts] for ts in lists]


def same_bits(got, expected) -> bool:
    as_int = {2: torch.int16, 4: torch.int32}
    flat = lambda lists: [t.cpu().view(as_int[t.element_size()]) for ts in lists for t in ts]
    return all(torch.equal(a, b) for a, b in zip(flat(got), flat(expected), strict=True))


def scalar(x, device=CUDA) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("mix", MIXES)
def test_adamw_has_the_bits_of_the_cpp_backend(mix, shift):
    cpu = state(mix=mix, shift=shift)
    gpu = to(cpu, CUDA)
    for coefficient in (None, 0.37):
        adamw(*gpu, None if coefficient is None else scalar(coefficient), scalar(0.0), *OPTIONS)
        with use_backend("cpp"):
            adamw(*cpu, None if coefficient is None else scalar(coefficient, CPU), scalar(0.0, CPU), *OPTIONS)
        assert same_bits(gpu, cpu)


@pytest.mark.parametrize("mix", MIXES)
def test_adamw_follows_the_definition(mix):
    gpu = to(state(mix=mix), CUDA)
    truth = to(gpu, CUDA)
    adamw(*gpu, scalar(0.5), None, *OPTIONS)
    adamw.definition(*truth, scalar(0.5), None, *OPTIONS)
    for got, expected in zip(itertools.chain(*gpu), itertools.chain(*truth), strict=True):
        ulp = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=8 * ulp, atol=8 * ulp)


@pytest.mark.parametrize("tensor_count", [2000, 10000])
def test_adamw_on_many_small_tensors(tensor_count):
    cpu = state([i % 97 for i in range(tensor_count)])
    gpu = to(cpu, CUDA)
    adamw(*gpu, None, None, *OPTIONS)
    with use_backend("cpp"):
        adamw(*cpu, None, None, *OPTIONS)
    assert same_bits(gpu, cpu)


@pytest.mark.parametrize("flag", [1.0, float("nan")])
def test_found_inf_leaves_every_bit(flag):
    gpu = to(state(mix="fp16-scaled"), CUDA)
    before = to(gpu, CPU)
    adamw(*gpu, scalar(float("inf")), scalar(flag), *OPTIONS)
    assert same_bits(gpu, before)


def test_transposed_and_strided_parameters():
    """Layouts with and without gaps: rows of an elementwise rule are taken in memory order, and copied where there are
    gaps.
    """
    p, g = torch.randn(64, 48, device=CUDA).t(), torch.randn(48, 64, device=CUDA)
    wide = torch.randn(48, 128, device=CUDA)
    params, grads = [p, wide[:, ::2]], [g, torch.randn(48, 64, device=CUDA)]
    m, v, steps = (
        [torch.zeros_like(x) for x in params],
        [torch.zeros_like(x) for x in params],
        [scalar(0.0), scalar(0.0)],
    )
    gpu = [params, [], [], grads, m, v, steps]
    truth = [[t.clone() for t in ts] for ts in gpu]
    adamw(*gpu, None, None, *OPTIONS)
    adamw.definition(*truth, None, None, *OPTIONS)
    for got, expected in zip(itertools.chain(*gpu), itertools.chain(*truth), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Every optimizer


@pytest.mark.parametrize("case", ADAMW + SGD + LAMB + ADAFACTOR, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_optimizers_agree_with_the_cpp_backend(case, dtype):
    """The same bits where a rule is elementwise; LAMB's and Adafactor's sums are added in another order."""
    op = OPS[case.op]
    gpu, cpu = case.make(dtype, CUDA), case.make(dtype, CPU)
    op(*gpu)
    with use_backend("cpp"):
        op(*cpu)
    for x, y in zip((a for a in gpu if isinstance(a, list)), (a for a in cpu if isinstance(a, list)), strict=True):
        if case.op in ("adamw", "sgd"):
            assert (x and isinstance(x[0], int)) or same_bits([x], [y])
        elif x and isinstance(x[0], torch.Tensor) and x[0].dtype != torch.int16 and "noise" not in case.name:
            for got, expected in zip(x, y, strict=True):
                ulp = torch.finfo(got.dtype).eps
                torch.testing.assert_close(got.cpu(), expected, rtol=8 * ulp, atol=8 * ulp)


# ---------------------------------------------------------------------------------------------------------------------
# Adafactor

FACTORED = ((300, 768), (768, 3000), (64,), (3, 40, 50), (5, 50257), (50257, 5), (1000, 1), (512, 3, 3), (70001,))


@pytest.mark.parametrize("options", [dict(variant="t5"), dict(beta1=0.9), dict(variant="torch", lr=1e-2)], ids=str)
@pytest.mark.parametrize(
    "dtype, master", [(F32, None), (BF16, None), (BF16, "fp32"), (BF16, "remainder"), (BF16, "stochastic")]
)
def test_adafactor_follows_the_cpp_backend(options, dtype, master):
    """Three steps; noise may round an ulp the other way where sums differ in their last bit."""
    torch.manual_seed(0)
    start = [(torch.randn(shape), torch.randn(shape)) for shape in FACTORED]
    ends = []
    for device, backend in ((CPU, "cpp"), (CUDA, "cuda")):
        params = [torch.nn.Parameter(p.to(device, dtype)) for p, _ in start]
        opt = optim.Adafactor(params, master=master, max_grad_norm=1.0, **options)
        for _ in range(3):
            for p, (_, g) in zip(params, start, strict=True):
                p.grad = g.to(device, dtype)
            with use_backend(backend):
                opt.step()
        ends.append([p.detach().cpu().float() for p in params])
    ulp = 2.0**-8 if dtype == BF16 else 2.0**-20
    for (p, _), a, b in zip(start, *ends, strict=True):
        assert not torch.equal(p.to(dtype).float(), b)
        assert (a - b).abs().max() <= ulp * a.abs().max() and (a - b).norm() <= 0.05 * (p.to(dtype).float() - a).norm()


def test_adafactor_has_the_same_bits_again():
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device=CUDA)) for shape in FACTORED]
        for p in params:
            p.grad = torch.randn_like(p)
        opt = optim.Adafactor(params, beta1=0.9)
        opt.step(), opt.step()
        runs.append(params)
    assert same_bits([runs[0]], [runs[1]]) and same_bits([runs[0]], [runs[2]])


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 2**35, reason="needs 32 GiB of free GPU memory"
)
def test_adafactor_on_more_than_two_billion_elements():
    """The last rows of a tall bf16 matrix move as they do in one of their own: factors of all rows are the same."""
    rows, columns = 2**20 + 3, 2048
    p = torch.nn.Parameter(torch.ones(rows, columns, dtype=BF16, device=CUDA))
    p.grad = torch.ones_like(p)
    optim.Adafactor([p], lr=0.5, scale_parameter=False).step()
    assert p[-1].unique().tolist() == p[0].unique().tolist() == [0.5]


# ---------------------------------------------------------------------------------------------------------------------
# grad_stats and unscale


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shift", [0, 1])
def test_grad_stats(dtype, shift):
    grads = to([tensors(SIZES, dtype, shift=shift)], CUDA)[0]
    scale, max_norm = scalar(128.0), 0.01
    norm, coefficient, found_inf = grad_stats(grads, scale, max_norm).tolist()
    exact = sum(g.double().square().sum().item() for g in grads) ** 0.5 / 128
    assert abs(norm - exact) <= 2e-7 * exact
    assert abs(coefficient - max_norm / (exact + 1e-6) / 128) <= 4e-7 * coefficient
    assert found_inf == 0


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e25])
def test_the_norm_survives_extreme_gradients(size):
    grads = [size * torch.ones(5000, device=CUDA)]
    norm, _, found_inf = grad_stats(grads, None, 0.0).tolist()
    assert abs(norm - size * 5000**0.5) <= 1e-6 * norm and found_inf == 0


def test_the_norm_is_deterministic_and_independent_of_alignment():
    runs = [grad_stats(to([tensors([300001, 7, 65536], F32)], CUDA)[0], None, 1.0) for _ in range(3)]
    shifted = torch.cat(tensors([300001, 7, 65536], F32)).to(CUDA)
    flat = torch.empty(shifted.numel() + 1, device=CUDA)[1:].copy_(shifted)
    runs.append(grad_stats(list(flat.split([300001, 7, 65536])), None, 1.0))
    assert all(torch.equal(r, runs[0]) for r in runs)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_bad_element_anywhere_is_found(dtype, bad):
    sizes = [5, 16385, 1, 4096]
    for tensor, element in ((0, 0), (0, 4), (1, 16383), (1, 16384), (2, 0), (3, 2222)):
        grads = to([tensors(sizes, dtype)], CUDA)[0]
        grads[tensor][element] = bad
        norm, _, found_inf = grad_stats(grads, None, 1.0).tolist()
        assert found_inf == 1 and not math.isfinite(norm)
        flag = scalar(0.0)
        unscale(grads, scalar(0.5), flag)
        assert flag.item() == 1


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shift", [0, 1])
def test_unscale_follows_the_definition(dtype, shift):
    grads = to([tensors(SIZES, dtype, shift=shift)], CUDA)[0]
    truth = [g.clone() for g in grads]
    flag = scalar(0.0)
    unscale(grads, scalar(0.3), flag)
    unscale.definition([t for t in truth if t.numel()], scalar(0.3), scalar(0.0))
    assert same_bits([grads], [truth]) and flag.item() == 0
    flag.fill_(1.0)
    unscale(grads, scalar(1.0), flag)
    assert flag.item() == 1, "the flag stays set"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 2**34, reason="needs 16 GiB of free GPU memory"
)
def test_more_than_two_billion_elements():
    n = 2**31 + 5
    g = torch.ones(n, dtype=F16, device=CUDA)
    norm = grad_stats([g], None, 0.0)[0].item()
    assert abs(norm - n**0.5) <= 1e-6 * norm
    flag = scalar(0.0)
    unscale([g], scalar(0.5), flag)
    assert flag.item() == 0 and g[-1].item() == 0.5 and g[2**31].item() == 0.5 and g[0].item() == 0.5
    g[-1] = float("nan")
    unscale([g], scalar(0.5), flag)
    assert flag.item() == 1 and g[-2].item() == 0.25


# ---------------------------------------------------------------------------------------------------------------------
# The chain


OPTIMIZERS = optim.AdamW, optim.LAMB, optim.SGD, optim.Adafactor


def model_and_grads(seed=0):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, device=CUDA)) for shape in ((1000,), (16384,), (33, 5), (700, 101))]
    for p in params:
        p.grad = 1024 * torch.randn_like(p)
    return params


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_graph_replay_equals_eager_steps(optimizer):
    eager, captured = model_and_grads(), model_and_grads()
    a, b = (optimizer(ps, lr=1e-2, max_grad_norm=1.0) for ps in (eager, captured))
    a.step(), b.step()  # warm-up: states exist, kernels are loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures a step, runs nothing
        b.step()
    for _ in range(3):
        a.step(), graph.replay()
    assert same_bits([eager], [captured])
    assert all(b.state[p]["step"].item() == 4 for p in captured)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_replay_reads_new_gradients_and_skips_on_overflow(optimizer):
    params = model_and_grads()
    opt = optimizer(params, lr=1e-2, max_grad_norm=1.0)
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    before = [p.detach().clone() for p in params]
    params[3].grad[7, 7] = float("inf")
    graph.replay()
    assert same_bits([params], [before])
    params[3].grad[7, 7] = 1.0
    graph.replay()
    assert not torch.equal(params[1], before[1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_waits_for_the_device(optimizer):
    params = model_and_grads()
    opt, scaler = optimizer(params, lr=1e-2, max_grad_norm=1.0), amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device=CUDA))  # makes the scale tensor, as the first loss does
    scaler.step(opt), scaler.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            scaler.step(opt)
            scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(opt.state[p]["step"].item() == 4 for p in params)


def test_a_step_runs_on_the_current_stream():
    params, reference = model_and_grads(), model_and_grads()
    opt, other = optim.AdamW(params, lr=1e-2), optim.AdamW(reference, lr=1e-2)
    other.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # clock ticks: about a tenth of a second
        for p in params:
            p.grad.mul_(1.0)
        opt.step()
    assert not side.query(), "the step must wait its turn on the side stream"
    side.synchronize()
    assert same_bits([params], [reference])
