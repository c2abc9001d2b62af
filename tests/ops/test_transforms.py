"""What PyTorch does to functions, done to ours: compiling, fake tensors, checkpointing, autocast, and the transforms of
torch.func.
"""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import ATTENTION, POSITIONS, ROTATE, position
from tolerance import leaves_of
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.ops.attention import LEARNED, attention, attention_backward
from fastlm.ops.rotary import rotate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()


def heads(n=2, L=9, D=16, seed=0):
    return torch.randn(1, n, L, D, generator=torch.Generator().manual_seed(seed))


def layer(name="t5", causal=True, **options):
    """A function of q, k, v and its scheme's parameters; the parameters."""
    scheme = position(name, 2, 16, causal)
    return lambda q, k, v: fastlm.attention(q, k, v, position=scheme, causal=causal, **options), list(
        scheme.parameters()
    )


def out_and_gradients(run, leaves, parameters):
    out = run(*leaves)
    return [
        out.detach(),
        *torch.autograd.grad(out, [*leaves, *parameters], heads(seed=7).to(out.dtype), allow_unused=True),
    ]


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", POSITIONS)
def test_compiles_into_one_graph(name):
    run, parameters = layer(name, key_lengths=torch.tensor([7]), dropout=0.2, seed=3)
    leaves = [heads(seed=s).requires_grad_() for s in range(3)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = out_and_gradients(compiled, leaves, parameters), out_and_gradients(run, leaves, parameters)
    if name in ("shaw near", "deberta v1", "deberta v3"):  # in a graph each distance has a vector: other sums, in order
        return torch.testing.assert_close(got, expected)
    assert_equal(got, expected)


def test_compiles_once_for_all_lengths(backend):
    run, _ = layer("t5")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (9, 12, 15):
            leaves = [heads(L=L, seed=s) for s in range(3)]
            assert torch.equal(compiled(*leaves), run(*leaves))


def test_plain_attention_compiles_once_for_all_lengths():
    """The way to scaled_dot_product_attention, with fewer key heads than query heads."""
    run = lambda q, k, v: fastlm.attention(q, k, v, causal=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (9, 12, 15):
            q, k = torch.randn(1, 4, L, 16), torch.randn(1, 2, L, 16)
            torch.testing.assert_close(compiled(q, k, k), run(q, k, k))


def test_dropout_draws_its_seed_inside_a_graph():
    """From torch's generator, at each call, as without compiling."""
    run, _ = layer("alibi", dropout=0.5)
    q = heads()
    drawn = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        drawn.append([f(q, q, q), f(q, q, q)])
    assert_equal(*drawn)
    assert not torch.equal(*drawn[0])


OPERATOR_TESTS = ("test_schema", "test_faketensor", "test_autograd_registration")
SOME = (
    "causal",
    "odd",
    "kerple_gqa",
    "transformer_xl",
    "xlnet",
    "deberta_gqa",
    "shaw",
    "every_mask",
    "bias_keys",
    "dropout",
)


@pytest.mark.parametrize("case", [case for case in ATTENTION if case.name in SOME], ids=str)
def test_attention_is_a_proper_operator(case, backend):
    args = case.make(torch.float32, CPU)
    # seconds each; a graph holds the operator, whoever computes it
    symbolic = ("test_aot_dispatch_dynamic",) if case.name in ("every_mask", "xlnet") and backend == "cpp" else ()
    torch.library.opcheck(
        attention.torch_op, tuple(args._replace(**leaves_of(args))), test_utils=OPERATOR_TESTS + symbolic
    )
    out, lse = attention(args)
    needs_grad = [getattr(args, name) is not None for name in LEARNED]
    torch.library.opcheck(
        attention_backward.torch_op, (out, lse, out, lse, *args, needs_grad), test_utils=OPERATOR_TESTS[:2]
    )


@pytest.mark.parametrize("case", ROTATE, ids=str)
def test_rotate_is_a_proper_operator(case, backend):
    x, *angles, layout = case.make(torch.float32, CPU)
    symbolic = ("test_aot_dispatch_dynamic",) if case.name == "partial" else ()
    torch.library.opcheck(rotate.torch_op, (x.requires_grad_(), *angles, layout), test_utils=OPERATOR_TESTS + symbolic)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("seed", [3, None], ids=["seed_given", "seed_drawn"])
@pytest.mark.parametrize("name", ["rope", "t5", "shaw"])
def test_checkpointing_drops_the_same_again(name, seed, reentrant, backend):
    run, parameters = layer(name, dropout=0.5, seed=seed)
    leaves = [heads(seed=s).requires_grad_() for s in range(3)]
    results = []
    for f in (run, lambda *leaves: checkpoint(run, *leaves, use_reentrant=reentrant, preserve_rng_state=True)):
        torch.manual_seed(0)
        for leaf in (*leaves, *parameters):
            leaf.grad = None
        f(*leaves).backward(heads(seed=7))
        results.append([leaf.grad for leaf in (*leaves, *parameters)])
    assert_equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["rope", "t5", "deberta", "transformer-xl", "shaw"])
def test_autocast_is_casting_what_goes_in(name, dtype, backend):
    """Be the backward pass inside or outside; gradients have their leaves' dtype."""
    run, parameters = layer(name)
    leaves = [heads(seed=s).requires_grad_() for s in range(3)]
    cast = out_and_gradients(lambda *leaves: run(*(t.to(dtype) for t in leaves)), leaves, parameters)
    with torch.autocast("cpu", dtype):
        inside = out_and_gradients(run, leaves, parameters)
        out = run(*leaves)
    outside = [
        out.detach(),
        *torch.autograd.grad(out, [*leaves, *parameters], heads(seed=7).to(dtype), allow_unused=True),
    ]
    assert inside[0].dtype == dtype and all(g.dtype == torch.float32 for g in inside[1:])
    assert_equal(inside, outside)
    for a, b in zip(inside, cast, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)  # a scheme's own linear layers are cast too


def test_autocast_leaves_rotations_alone(backend):
    x, cos, sin, layout = ROTATE[0].make(torch.float32, CPU)
    x.requires_grad_()
    plain = fastlm.rotate(x, cos, sin, layout=layout)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fastlm.rotate(x, cos, sin, layout=layout)
        (got,) = torch.autograd.grad(inside, x, plain)
    assert torch.equal(inside, plain)
    assert torch.equal(got, *torch.autograd.grad(plain, x, plain.detach()))


# ---------------------------------------------------------------------------------------------------------------------
# torch.func: refused, unless it is given the definition


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(torch.stack((x, 2 * x))),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "forward mode": dual,
}
FUNCTIONS = {
    "attention": lambda x: fastlm.attention(x, x, x, position=position("alibi", 2, 4, True), causal=True),
    "rotate": lambda x: fastlm.rotate(x, torch.ones(3, 2), torch.ones(3, 2)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_transforms_are_refused_with_the_cure(function, transform):
    run = lambda x: TRANSFORMS[transform](FUNCTIONS[function], x)
    message = (
        rf'do not see through fastlm.{function}: put a mapped dimension into the batch, .*use_backend\("reference"\)'
    )
    for f in (run, torch.compile(run, backend="eager")) if function == "rotate" else (run,):
        with pytest.raises(fastlm.BackendError, match=message):
            f(heads(L=3, D=4))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_transforms_see_through_the_definition(function):
    f, x = FUNCTIONS[function], heads(L=3, D=4).double().requires_grad_()
    with fastlm.use_backend("reference"):
        made = {name: transform(f, x.detach()) for name, transform in TRANSFORMS.items()}
        (grad,) = torch.autograd.grad(f(x).square().sum(), x)
        jacobian = torch.autograd.functional.jacobian(f, x.detach()).flatten(4).flatten(0, 3)
        hessian = torch.func.jacrev(torch.func.grad(lambda x: f(x).square().sum()))(x.detach())
        torch.testing.assert_close(made["vmap"], torch.stack((f(x), f(2 * x))))
        torch.testing.assert_close(made["grad"], grad)
        torch.testing.assert_close(made["vjp"][0].flatten(), x.flatten() @ jacobian)
        torch.testing.assert_close(made["jvp"], (f(x), jacobian.sum(1).view_as(x)))
        torch.testing.assert_close(made["forward mode"], jacobian.sum(1).view_as(x))
        torch.testing.assert_close(made["hessian"], hessian)


# ---------------------------------------------------------------------------------------------------------------------
# Second derivatives: refused, unless they are the definition's


@pytest.mark.parametrize("name", [None, "alibi", "shaw"], ids=["plain", "alibi", "shaw"])
def test_a_second_derivative_is_refused_with_the_cure(name):
    run, _ = layer(name) if name else (lambda *leaves: fastlm.attention(*leaves, causal=True), None)
    x = heads(L=3).requires_grad_()
    (grad,) = torch.autograd.grad(run(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(fastlm.BackendError, match=r'differentiable once, and more .*use_backend\("reference"\)'):
        grad.sum().backward()
    out = run(x, x, x)
    twice = [torch.autograd.grad(out.sum(), x, create_graph=graph, retain_graph=True)[0] for graph in (False, True)]
    assert torch.equal(*twice)


@pytest.mark.parametrize("name", ["none", "rope", "alibi", "shaw", "transformer-xl", "deberta"])
def test_the_definition_is_differentiable_twice(name):
    scheme = position(name, 2, 4, True).double()
    parameters = list(scheme.parameters())
    options = dict(causal=True, dropout=0.3, seed=1, return_lse=True)
    leaves = [heads(L=3, D=4, seed=s).double().requires_grad_() for s in range(3)]

    def run(q, k, v, *_):
        terms = scheme.terms(3, 3, dtype=torch.float64)
        return fastlm.attention(q, k, v, position=terms, **options)

    with fastlm.use_backend("reference"):
        assert torch.autograd.gradgradcheck(run, (*leaves, *parameters), fast_mode=True)


def test_the_definition_is_differentiable_often():
    x = heads(L=3, D=4).double().requires_grad_()
    with fastlm.use_backend("reference"):
        ours = fastlm.attention(x, x, x, causal=True)
        plain = (x @ x.mT / 2).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1) @ x
        for _ in range(3):
            ours, plain = (torch.autograd.grad(y.square().sum(), x, create_graph=True)[0] for y in (ours, plain))
    torch.testing.assert_close(ours, plain)
