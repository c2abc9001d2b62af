"""AdamW against its paper in fp64 numpy, against torch's class, and where gradients are odd, missing or not finite."""

import copy

import numpy as np
import pytest
import torch
from cases import ADAMW
from torch import nn


import fastlm
from fastlm.ops.adamw import adamw
from fastlm.ops.unscale import grad_stats, unscale
from fastlm.optim import OPTIMIZERS, AdamW, decay_groups


def params_and_grads(shapes=((7, 5), (4,), ()), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    return params, lambda: [setattr(p, "grad", torch.randn(p.shape, generator=g).to(dtype)) for p in params]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_twenty_steps_of_the_paper(backend, bias_correction):
    """Loshchilov & Hutter 2019, algorithm 2, in fp64 numpy."""
    lr, (b1, b2), eps, decay = 1e-2, (0.9, 0.95), 1e-8, 0.1
    params, new_grads = params_and_grads()
    theta = [p.detach().numpy().astype(np.float64) for p in params]
    m, v = [0.0] * 3, [0.0] * 3
    optimizer = AdamW(params, lr, (b1, b2), eps, decay, bias_correction=bias_correction)
    for t in range(1, 21):
        new_grads()
        for i, p in enumerate(params):
            g = p.grad.numpy().astype(np.float64)
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g * g
            m_hat, v_hat = (m[i] / (1 - b1**t), v[i] / (1 - b2**t)) if bias_correction else (m[i], v[i])
            theta[i] = theta[i] - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * theta[i])
        with fastlm.use_backend(adamw=backend):
            optimizer.step()
    for p, exact in zip(params, theta, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", [{}, dict(maximize=True), dict(weight_decay=0.0, betas=(0.0, 0.5))], ids=str)
def test_equals_torch(options):
    params, new_grads = params_and_grads()
    theirs = [nn.Parameter(p.detach().clone()) for p in params]
    a, b = AdamW(params, 3e-3, **options), torch.optim.AdamW(theirs, 3e-3, **options)
    for _ in range(20):
        new_grads()
        for p, q in zip(params, theirs, strict=True):
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_state_dicts_go_both_ways():
    params, new_grads = params_and_grads()
    ours = AdamW([{"params": params[:1], "lr": 1e-2}, {"params": params[1:], "weight_decay": 0.0}])
    for _ in range(3):
        new_grads(), ours.step()
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW([{"params": copies[:1]}, {"params": copies[1:]}])
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch's loading shares memory
    third = [nn.Parameter(p.detach().clone()) for p in params]
    back = AdamW([{"params": third[:1]}, {"params": third[1:]}])
    back.load_state_dict(theirs.state_dict())
    new_grads()
    for p, q, r in zip(params, copies, third, strict=True):
        q.grad, r.grad = p.grad.clone(), p.grad.clone()
    ours.step(), theirs.step(), back.step()
    for p, q, r in zip(params, copies, third, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert torch.equal(p, r)


def test_moments_of_bf16_parameters_stay_fp32_through_a_state_dict():
    params, new_grads = params_and_grads(dtype=torch.bfloat16)
    ours = AdamW(params)
    new_grads(), ours.step()
    again = AdamW([nn.Parameter(p.detach().clone()) for p in params])
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        assert again.state[q]["exp_avg"].dtype == torch.float32
        assert torch.equal(ours.state[p]["exp_avg"], again.state[q]["exp_avg"])


def test_copies_and_pickles_keep_the_clip():
    params, _ = params_and_grads()
    assert copy.deepcopy(AdamW(params, max_grad_norm=0.5)).max_grad_norm == 0.5


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_clipping_is_global_and_reported(backend):
    params, new_grads = params_and_grads()
    theirs = [nn.Parameter(p.detach().clone()) for p in params]
    a = AdamW([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=0.1)
    b = torch.optim.AdamW(theirs)
    for _ in range(5):
        new_grads()
        for p, q in zip(params, theirs, strict=True):
            q.grad = p.grad.clone()
        with fastlm.use_backend(backend):
            a.step()
        norm = nn.utils.clip_grad_norm_(theirs, 0.1)
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_step_that_is_skipped_changes_no_bit(backend, bad):
    params, new_grads = params_and_grads()
    optimizer = AdamW(params, max_grad_norm=1.0)
    new_grads(), optimizer.step()
    before = copy.deepcopy([list(params), optimizer.state_dict()["state"]])
    new_grads()
    params[1].grad[2] = bad
    with fastlm.use_backend(backend):
        optimizer.step()
    assert optimizer.overflow == 1 and not optimizer.grad_norm.isfinite()
    after = [list(params), optimizer.state_dict()["state"]]
    for x, y in zip(tensors(before), tensors(after), strict=True):
        assert torch.equal(x, y)
    new_grads(), optimizer.step()
    assert optimizer.overflow == 0 and optimizer.state[params[0]]["step"] == 2


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for x in (tree.values() if isinstance(tree, dict) else tree) for t in tensors(x)]


@pytest.mark.parametrize("case", ADAMW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ops_agree_with_their_definitions(case, dtype):
    """C++ in every instruction set, for every mix of layouts: the definition's numbers, bit for bit in fp32 statistics."""
    from fastlm import native

    make = lambda: case.make(dtype, torch.device("cpu"))
    expected = make()
    with fastlm.use_backend("reference"):
        adamw(*expected)
    active = native.cpu().active()
    try:
        for isa in native.cpu().available():
            native.cpu().use(isa)
            got = make()
            with fastlm.use_backend("cpp"):
                adamw(*got)
            for mine, theirs in zip(got[:5], expected[:5], strict=True):
                for x, y in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-6 if x.dtype == torch.float32 else None, atol=1e-6 if x.dtype == torch.float32 else None)
    finally:
        native.cpu().use(active)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grad_stats(dtype):
    grads = [g.to(dtype) for g in (torch.randn(1000, 33), torch.randn(5), torch.randn(0), torch.randn(8, 6).T)]
    expected = torch.cat([g.double().flatten() for g in grads]).norm() / 8
    for backend in ("cpp", "reference"):
        with fastlm.use_backend(backend):
            norm, coefficient, overflow = grad_stats(grads, torch.tensor(8.0), 2.0)
            torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
            torch.testing.assert_close(coefficient.double(), min(1.0, 2.0 / (expected + 1e-6)) / 8, rtol=1e-6, atol=0, check_dtype=False)
            assert overflow == 0
            assert grad_stats([*grads, torch.tensor([torch.inf]).to(dtype)], None, 0.0)[2] == 1
            assert grad_stats(grads, torch.tensor(8.0), 0.0)[1] == 0.125


def test_the_norm_does_not_depend_on_threads():
    grads = [torch.randn(300_000), torch.randn(77)]
    threads = torch.get_num_threads()
    try:
        norms = [[torch.set_num_threads(n), grad_stats(grads, None, 1.0)[0].item()][1] for n in (1, 2, 3, 7)]
    finally:
        torch.set_num_threads(threads)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_unscale(backend):
    grads = [torch.randn(40, 3).T, torch.randn(9).half()]
    expected = [g * 0.25 for g in grads]
    flag = torch.zeros(())
    with fastlm.use_backend(backend):
        unscale(grads, torch.tensor(0.25), flag)
        assert flag == 0
        for g, e in zip(grads, expected, strict=True):
            torch.testing.assert_close(g, e)
        unscale([torch.tensor([1.0, torch.nan])], torch.tensor(1.0), flag)
    assert flag == 1


def test_every_kind_of_odd_parameter():
    base = torch.randn(6, 4)
    params = [nn.Parameter(t) for t in (base[:, ::2], base.T.clone().T, torch.randn(0, 3), torch.randn(()))]
    frozen, late = nn.Parameter(torch.randn(2), requires_grad=False), nn.Parameter(torch.randn(3))
    optimizer = AdamW([*params, frozen], 0.1)
    reference = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in params], 0.1)
    for step in range(3):
        for p, q in zip(params, reference.param_groups[0]["params"], strict=True):
            p.grad = None if step == 1 and p is params[0] else torch.randn(p.shape)
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step(), reference.step()
    for p, q in zip(params, reference.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[late]["step"] == 1


def test_closures_hooks_and_schedulers():
    params, new_grads = params_and_grads()
    optimizer = AdamW(params, lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    schedule.step()
    assert first.requires_grad is not None and seen == ["before", "after"] and optimizer.param_groups[0]["lr"] == 0.5


def test_no_gradients_is_no_step():
    params, _ = params_and_grads()
    AdamW(params, max_grad_norm=1.0).step()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=-1.0), "lr is -1.0"),
        (dict(betas=(1.0, 0.9)), r"betas are \(1.0, 0.9\)"),
        (dict(amsgrad=True), "does not serve amsgrad"),
        (dict(max_grad_norm=0.0), "max_grad_norm is 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.zeros(1))], **options)


def test_what_cannot_be_stepped_is_refused_before_anything_changes():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \[4, 2\] has a sparse gradient; build its Embedding with sparse=False"):
        AdamW(embedding.parameters()).step()
    z = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(ValueError, match="complex"):
        AdamW([z]).step()


def test_decay_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 3))
    model[0].weight.requires_grad_(False)
    decayed, free = decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(5, 3)] and decayed["weight_decay"] == 0.1
    assert len(free["params"]) == 3 and free["weight_decay"] == 0.0


def test_ops_are_proper_operators():
    cases = {case.name: case.make(torch.float32, torch.device("cpu")) for case in ADAMW}
    torch.library.opcheck(adamw.torch_op, cases["mixed_shapes"])
    torch.library.opcheck(adamw.torch_op, cases["bare"])
    grads = cases["mixed_shapes"][1]
    torch.library.opcheck(grad_stats.torch_op, (grads, torch.tensor(2.0), 1.0))
    torch.library.opcheck(unscale.torch_op, (grads, torch.tensor(2.0), torch.zeros(())))


def test_registry():
    assert OPTIMIZERS["adamw"] is AdamW
