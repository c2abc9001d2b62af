"""Our classes by name in the place of torch's, Hugging Face's, apex's and DeepSpeed's: every documented argument, every
state dict in both directions, and what another class's argument or state dict is told.
"""

import copy
import inspect
import itertools

import pytest
import torch
import transformers
from torch import nn

from fastlm import optim

HF = transformers.optimization.Adafactor
TENSOR = torch.tensor
MOMENTUM, L2 = dict(momentum=0.9), dict(weight_decay=0.1)
SWITCHES = dict(maximize=[True], foreach=[True, False], fused=[True], differentiable=[False])
ADAM = dict(
    lr=[0.1, TENSOR(0.1)],
    betas=[(0.5, 0.9), [0.9, 0.99], (TENSOR(0.9), TENSOR(0.99))],
    eps=[1e-3],
    weight_decay=[0.1],
    amsgrad=[False],
    capturable=[False],
    **SWITCHES,
)
ARGUMENTS = {  # of each class that ours take the place of: other values than the default, with what they need besides
    (optim.SGD, torch.optim.SGD, "lr", "momentum"): dict(
        lr=[0.1, TENSOR(0.1)],
        momentum=[0.0, 0.9],
        dampening=[(0.5, MOMENTUM)],
        weight_decay=[0.1, TENSOR(0.1)],
        nesterov=[(True, MOMENTUM)],
        **SWITCHES,
    ),
    (optim.Adam, torch.optim.Adam): ADAM | dict(decoupled_weight_decay=[(True, L2)]),
    (optim.AdamW, torch.optim.AdamW): ADAM,
    (optim.Adafactor, torch.optim.Adafactor): dict(
        lr=[0.1, TENSOR(0.1)],
        beta2_decay=[-0.5],
        eps=[(1e-3, 1e-2), (None, 1e-2)],
        d=[2.0],
        weight_decay=[0.1],
        foreach=[True, False],
        maximize=[True],
    ),
    (optim.Adafactor, HF): dict(
        lr=[(0.1, dict(relative_step=False))],
        eps=[(1e-3, 1e-2)],
        clip_threshold=[0.5],
        decay_rate=[-0.5],
        beta1=[0.9, 0.0],
        weight_decay=[0.1],
        scale_parameter=[False],
        relative_step=[True],
        warmup_init=[True],
    ),
}
SAYS_VARIANT = {
    torch.optim.Adafactor: dict(d=1.0),
    HF: dict(clip_threshold=1.0),
}  # what a class alone has, at its default
CASES = [
    (ours, theirs, {**(value[1] if with_more(value) else {}), name: value[0] if with_more(value) else value})
    for with_more in [lambda value: isinstance(value, tuple) and isinstance(value[-1], dict)]
    for (ours, theirs, *_), table in ARGUMENTS.items()
    for name, values in table.items()
    for value in values
]
IDS = [f"{theirs.__module__.split('.')[0]}-{theirs.__name__}-{options}" for _, theirs, options in CASES]
SHAPES = ((6, 5), (4,), (3, 6, 4), (), (1, 7), (7, 1), (2, 1, 3))


def params_of(shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]


def trained(make, options, params, steps, state_dict=None):
    optimizer = make(params, **copy.deepcopy(options))
    if state_dict is not None:
        optimizer.load_state_dict(copy.deepcopy(state_dict))
    for seed in steps:
        g = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return optimizer


def assert_close(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and state dicts


@pytest.mark.parametrize("ours, theirs, options", CASES, ids=IDS)
def test_every_argument_by_name_and_every_state_dict_whole(ours, theirs, options):
    """Five steps of both; then three more by each, from its own state and from the other's, groups and all."""
    options = SAYS_VARIANT.get(theirs, {}) | options
    xs, ys = params_of(), params_of()
    a, b = trained(ours, options, xs, range(5)), trained(theirs, options, ys, range(5))
    assert_close(xs, ys)
    for make, saved, at in ((theirs, a, xs), (ours, b, ys)):
        there, here = ([nn.Parameter(p.detach().clone()) for p in at] for _ in range(2))
        trained(make, options, there, range(5, 8), saved.state_dict())
        trained(type(saved), options, here, range(5, 8), saved.state_dict())
        assert_close(there, here)


def test_every_documented_argument_is_among_them():
    for (_, theirs, *_), table in ARGUMENTS.items():
        assert set(inspect.signature(theirs).parameters) - {"params"} == set(table)


@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW])
@pytest.mark.parametrize("option", ["amsgrad", "differentiable"])
def test_what_is_not_served_is_refused_wherever_it_is_given(make, option):
    """As an argument, in a group, in a state dict, and written into a group afterwards."""
    theirs = getattr(torch.optim, make.__name__)(params_of(), **{option: True})
    refused = pytest.raises(ValueError, match=f"{option} is True: .* is not served here; torch.optim")
    with refused:
        make(params_of(), **{option: True})
    with refused:
        make([{"params": params_of(), option: True}])
    with refused:
        make(params_of()).load_state_dict(theirs.state_dict())
    with refused:
        optimizer = make(params_of())
        optimizer.param_groups[0][option] = True
        optimizer.step()


def test_weight_decay_is_that_of_the_state_dict_or_refused():
    decoupled = dict(weight_decay=0.1, decoupled_weight_decay=True)
    saved = torch.optim.Adam(params_of(), **decoupled).state_dict()
    xs, ys = params_of(), params_of()
    a = trained(optim.Adam, {}, xs, range(3), saved)
    trained(torch.optim.AdamW, dict(weight_decay=0.1), ys, range(3))
    assert_close(xs, ys)
    saved["param_groups"][0]["decoupled_weight_decay"] = False
    with pytest.raises(ValueError, match=r"decoupled_weight_decay is False: .* give one of these, or weight_decay=0"):
        optim.AdamW(params_of()).load_state_dict(saved)
    saved["param_groups"][0]["weight_decay"] = 0
    adamw = optim.AdamW(params_of())
    adamw.load_state_dict(saved)
    assert adamw.param_groups[0]["decoupled_weight_decay"] and a.param_groups[0]["decoupled_weight_decay"]
    with pytest.raises(ValueError, match="decoupled_weight_decay is False"):
        optim.AdamW(params_of(), decoupled_weight_decay=False)
    for option in (dict(variant="bert"), dict(scale_by_rms=True)):
        with pytest.raises(ValueError, match="AdamW has"):
            optim.Adam(params_of()).load_state_dict(optim.AdamW(params_of(), **option).state_dict())


# Arguments of apex's and DeepSpeed's classes, which are not installed: the value that ours computes, and one that is
# refused, with a word of the cure; None where every value gives the same numbers.
BY_SIGNATURE = {
    optim.Adam: dict(bias_correction=(True, False, "bert"), adam_w_mode=(False, True, "is AdamW")),
    optim.AdamW: dict(
        bias_correction=(True, False, "bert"),
        correct_bias=(True, False, "bert"),
        adam_w_mode=(True, False, "Adam"),
        amsgrad=(False, True, "torch.optim.Adam"),
        set_grad_none=(True, None),
        capturable=(True, None),
        master_weights=(False, True, 'master="fp32"'),
    ),
    optim.LAMB: dict(
        bias_correction=(True, False, "google"),
        amsgrad=(False, True, "torch.optim.Adam"),
        adam_w_mode=(True, False, "Adam"),
        grad_averaging=(True, False, "never a sum"),
        set_grad_none=(True, None),
        use_nvlamb=(True, False, "adapt=True"),
        eps_inside_sqrt=(False, True, "root"),
        max_coeff=(float("inf"), 10.0, 'variant="deepspeed" and bounds='),
        min_coeff=(0.0, 0.01, 'variant="deepspeed" and bounds='),
    ),
    optim.SGD: dict(
        wd_after_momentum=(False, True, "as torch's does"),
        materialize_master_grads=(False, None),
        set_grad_none=(True, None),
    ),
}


@pytest.mark.parametrize("make, name", [(make, name) for make, table in BY_SIGNATURE.items() for name in table])
def test_options_of_apex_and_deepspeed_are_taken_where_they_say_what_is_done(make, name):
    value, other, *cure = BY_SIGNATURE[make][name]
    xs, ys = params_of(), params_of()
    trained(make, {name: value}, xs, range(3)), trained(make, {}, ys, range(3))
    assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
    if other is not None:
        with pytest.raises(ValueError, match=f"{name} is {other!r}: .*{cure[0]}"):
            make(params_of(), **{name: other})


def test_the_variants_of_lamb_take_what_their_classes_take():
    apex = dict(variant="apex", bias_correction=True, adam_w_mode=True, grad_averaging=True, use_nvlamb=False)
    deepspeed = dict(variant="deepspeed", bias_correction=True, max_coeff=10.0, min_coeff=0.01, eps_inside_sqrt=False)
    for options in (
        apex,
        deepspeed,
        dict(variant="google", bias_correction=False),
        dict(apex, adapt=True, use_nvlamb=True),
    ):
        optim.LAMB(params_of(), **options)


def test_a_group_that_was_clipped_is_loaded_by_an_optimizer_that_clips_alike():
    saved = optim.LAMB(params_of()).state_dict()
    saved["param_groups"][0]["max_grad_norm"] = 1.0  # as apex's FusedLAMB has it
    optim.LAMB(params_of(), max_grad_norm=1.0).load_state_dict(saved)
    for clip in (None, 0.5):
        with pytest.raises(ValueError, match=r"max_grad_norm is 1.0: it is of all groups; give the same"):
            optim.LAMB(params_of(), max_grad_norm=clip).load_state_dict(saved)


# ---------------------------------------------------------------------------------------------------------------------
# Another's state dict

SGD = {
    "ours": optim.SGD,
    "torch's": torch.optim.SGD,
    "torch's with momentum": lambda ps: torch.optim.SGD(ps, momentum=0.9),
}
ADAMS = {"Adam": optim.Adam, "AdamW": optim.AdamW, "torch's Adam": torch.optim.Adam, "torch's AdamW": torch.optim.AdamW}
LAMB = {"LAMB": optim.LAMB}
ADAFACTOR = {
    variant: lambda ps, variant=variant: optim.Adafactor(ps, variant=variant) for variant in ("huggingface", "torch")
}
ADAFACTOR |= {"Hugging Face's": HF, "torch's": torch.optim.Adafactor}
FAMILIES = [SGD, ADAMS, LAMB, ADAFACTOR]
STRANGERS = {"Adamax": torch.optim.Adamax, "Adagrad": torch.optim.Adagrad}


@pytest.mark.parametrize("theirs, ours", [*itertools.permutations(FAMILIES, 2)], ids=lambda family: next(iter(family)))
def test_the_state_dict_of_another_optimizer_is_refused_in_words(theirs, ours):
    """Before its first step, when there is no state, and after it."""
    makers = [make for name, make in ours.items() if "'s" not in name]
    for make, other, steps in itertools.product(makers, theirs.values(), (0, 1)):
        saved = trained(other, {}, params_of(), range(steps)).state_dict()
        with pytest.raises(
            ValueError, match="load the state dict into the class that saved it, or train on without it"
        ):
            make(params_of()).load_state_dict(saved)


@pytest.mark.parametrize("other", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.LAMB])
def test_states_of_an_optimizer_that_is_not_known_are_refused_in_words(make, other):
    saved = trained(other, {}, params_of(), range(1)).state_dict()
    by_state = f"a saved state has 'step'.* and {make.__name__} needs 'step', 'exp_avg', 'exp_avg_sq'"
    with pytest.raises(ValueError, match=f"{by_state}|which {other.__name__} has and {make.__name__} has not"):
        make(params_of()).load_state_dict(saved)


def test_lamb_refuses_the_state_dict_of_apexs_fused_adam():
    """Whose groups have no option that Adam's lack; FusedLAMB's have."""
    saved = trained(optim.Adam, {}, params_of(), range(1)).state_dict()
    options = dict(lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1)
    saved["param_groups"] = [options | {"params": saved["param_groups"][0]["params"]}]
    with pytest.raises(ValueError, match="apex's FusedAdam, and this is LAMB; load"):
        optim.LAMB(params_of(), variant="apex").load_state_dict(saved)
    saved["param_groups"][0] |= dict(grad_averaging=True, max_grad_norm=0.0)
    optim.LAMB(params_of(), variant="apex").load_state_dict(saved)


@pytest.mark.parametrize("saved, has", [(dict(weight=1, bias=2), "'weight', 'bias'"), ({}, "nothing")], ids=str)
def test_what_is_no_optimizers_state_dict_is_refused_in_words(saved, has):
    with pytest.raises(ValueError, match=f"the state dict has {has}; give an optimizer's"):
        optim.AdamW(params_of()).load_state_dict(saved)


# ---------------------------------------------------------------------------------------------------------------------
# Adafactor: which one is meant


@pytest.mark.parametrize(
    "options, variant",
    [
        *[(option, "torch") for option in (dict(d=1.0), dict(beta2_decay=-0.8), dict(maximize=True))],
        (dict(foreach=False), "torch"),
        *[(option, "huggingface") for option in (dict(clip_threshold=1.0), dict(decay_rate=-0.8), dict(beta1=0.9))],
        *[({name: False}, "huggingface") for name in ("relative_step", "scale_parameter", "warmup_init")],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_an_argument_that_one_class_alone_has_says_which_is_meant(options, variant):
    assert optim.Adafactor(params_of(), lr=0.1, **options).param_groups[0]["variant"] == variant


@pytest.mark.parametrize("options", [{}, dict(lr=0.1), dict(eps=(1e-3, 1e-2), weight_decay=0.1)], ids=str)
def test_without_one_it_says_aloud_which_computes(options):
    with pytest.warns(UserWarning, match="computes as transformers.Adafactor does.* give variant=") as warned:
        optimizer = optim.Adafactor(params_of(), **options)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert optimizer.param_groups[0]["variant"] == "huggingface"


def test_arguments_of_both_classes_are_refused():
    message = "d is an argument of torch.optim.Adafactor and beta1 is an argument of transformers.Adafactor; say which"
    with pytest.raises(ValueError, match=message):
        optim.Adafactor(params_of(), d=1.0, beta1=0.9)
    group = optim.Adafactor(params_of(), d=2.0, variant="huggingface").param_groups[0]
    assert group["clip_threshold"] == 2.0 and "d" not in group


def test_a_group_has_the_names_of_its_variant():
    groups = [
        {"params": params_of(), "clip_threshold": 2.0},
        {"params": params_of(), "variant": "huggingface", "eps": (1e-30, 1e-3), "d": 3.0},
    ]
    torchs, hugging = optim.Adafactor(groups, variant="torch", beta2_decay=-0.5).param_groups
    assert (torchs["d"], torchs["beta2_decay"], hugging["clip_threshold"], hugging["decay_rate"]) == (
        2.0,
        -0.5,
        3.0,
        -0.5,
    )
