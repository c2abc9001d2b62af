"""What optimizers refuse, in words that name the value and the cure."""

import pytest
import torch
from cases import OPTIMIZERS
from formulas import KINDS
from steps import BF16, F16, make, params_and_grads
from torch import nn

import fastlm
from fastlm import optim
from fastlm.backends import dispatch


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("adamw", dict(lr=-1.0), "lr is -1.0"),
        ("adamw", dict(betas=(1.0, 0.9)), r"betas are \(1.0, 0.9\)"),
        ("adamw", dict(amsgrad=True), "amsgrad is True: .* is not served here"),
        ("adamw", dict(variant="google"), "choose from 'torch', 'bert'"),
        ("adamw", dict(max_grad_norm=0.0), "max_grad_norm is 0.0"),
        ("adamw", dict(master="fp8"), "choose from None, 'fp32', 'remainder', 'stochastic'"),
        ("adamw", dict(state_dtype="fp16"), "choose from 'fp32', 'bf16'"),
        ("adamw", dict(seed=-1), "seed is -1"),
        ("sgd", dict(nesterov=True), "nesterov takes momentum > 0"),
        ("lamb", dict(variant="nvidia"), "choose from 'paper', 'google', 'apex', 'deepspeed'"),
        ("lamb", dict(bounds=(2.0, 1.0)), "0 ≤ low ≤ high"),
        ("adafactor", dict(variant="keras"), "choose from 't5', 'huggingface', 'torch'"),
        ("adafactor", dict(lr=1e-3, relative_step=True), "do not go together"),
        ("adafactor", dict(lr=1e-3, warmup_init=True), "takes lr=None"),
        ("adafactor", dict(variant="t5", weight_decay=0.1), "has no weight decay"),
        ("adafactor", dict(variant="torch", beta1=0.9), "has no momentum"),
        ("adafactor", dict(decay_rate=0.8), "at most 0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        optim.OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_what_cannot_be_stepped_is_refused_before_anything_changes(name):
    make = optim.OPTIMIZERS[name]
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"shape \[4, 2\] has a sparse gradient; build its Embedding with sparse=False"
    ):
        make(embedding.parameters()).step()
    with pytest.raises(ValueError, match="complex"):
        make([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="expanded"):
        make([nn.Parameter(torch.zeros(1, 3).expand(4, 3))])
    optimizer = make([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="fp16; legal there: None, 'fp32'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=F16))], "master": "remainder"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_a_parameter_that_changed_its_size_is_refused(choice):
    """A state of another size must not reach C++ as an address."""
    params, new_grads = params_and_grads()
    optimizer = make(choice, params)
    new_grads(), optimizer.step()
    if len(optimizer.state[params[0]]) == 1:
        pytest.skip("keeps nothing of the parameter's size")
    params[0].data = torch.zeros(700, 500)
    new_grads()
    with pytest.raises(ValueError, match=r"\[0\] has shape \[7(, 5)?\], and its parameter needs \[700(, 500)?\]"):
        optimizer.step()


@pytest.mark.parametrize(
    "case, position, i, wrong, message",
    [
        (
            "adamw-mixed_shapes",
            6,
            1,
            torch.tensor(3),
            r"steps\[1\] is torch.int64 on cpu; it must be torch.float32 on cpu",
        ),
        ("sgd-mixed_shapes", 5, 0, torch.zeros(0), r"steps\[0\] has shape \[0\], and its parameter needs \[\]"),
        ("adafactor-mixed_shapes", 4, 0, torch.zeros(64, dtype=BF16), r"rows\[0\] is torch.bfloat16"),
        (
            "adafactor-mixed_shapes",
            5,
            3,
            torch.zeros(2, 50),
            r"cols\[3\] has shape \[2, 50\], and its parameter needs \[3, 50\]",
        ),
        (
            "lamb-masters",
            1,
            0,
            torch.zeros(64, 32),
            r"masters\[0\] has shape \[64, 32\], and its parameter needs \[64, 33\]",
        ),
        (
            "adamw-mixed_shapes",
            3,
            0,
            torch.zeros(33, 64),
            r"grads\[0\] has shape \[33, 64\], and its parameter needs \[64, 33\]",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(case, position, i, wrong, message):
    args = next(c for c in OPTIMIZERS if str(c) == case).make(BF16, torch.device("cpu"))
    args[position][i] = wrong
    with pytest.raises(ValueError, match=message), fastlm.use_backend("cpp"):
        dispatch.OPS[case.split("-")[0]](*args)
