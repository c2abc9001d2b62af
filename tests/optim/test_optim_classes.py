"""The optimizers as objects: what they load, copy and refuse, and in which words; groups and the memory table."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from fastlm import optim
from fastlm.optim import sharding

BF16, F32 = torch.bfloat16, torch.float32


def params_of(*shapes, dtype=F32):
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes]


def step(optimizer, seed=1):
    g = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
    optimizer.step()


def snapshot(optimizer):
    return copy.deepcopy((optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]))


def assert_same(a, b):
    for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# ---------------------------------------------------------------------------------------------------------------------
# State dicts


@pytest.mark.parametrize("counted", [3, torch.tensor([3])], ids=["number", "tensor"])
@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.LAMB])
def test_apex_counts_steps_in_the_group(make, counted):
    ps, qs = params_of((3, 2), (4,)), params_of((3, 2), (4,))
    ours, theirs = make(ps, max_grad_norm=1.0), make(qs, max_grad_norm=1.0)
    for seed in range(3):
        step(theirs, seed)
    state_dict = theirs.state_dict()
    state = {i: {name: x for name, x in values.items() if name != "step"} for i, values in state_dict["state"].items()}
    groups = [{**group, "step": counted, "max_grad_norm": 1.0} for group in state_dict["param_groups"]]
    with torch.no_grad():
        for p, q in zip(ps, qs, strict=True):
            p.copy_(q)
    ours.load_state_dict({"state": state, "param_groups": groups})
    step(ours), step(theirs)
    assert_same([list(ps), snapshot(ours)], [list(qs), snapshot(theirs)])
    assert not {"max_grad_norm", "step"} & ours.param_groups[0].keys()


def test_options_that_a_namesake_lacks_stay_as_they_are_in_their_group():
    ps = params_of((2,), (3,))
    ours = optim.AdamW(
        [{"params": ps[:1], "variant": "bert"}, {"params": ps[1:], "state_dtype": "bf16"}], scale_by_rms=True
    )
    theirs = torch.optim.AdamW([{"params": ps[:1]}, {"params": ps[1:], "lr": 0.5}])
    step(theirs)
    ours.load_state_dict(theirs.state_dict())
    kept = [(group["variant"], group["state_dtype"], group["scale_by_rms"], group["lr"]) for group in ours.param_groups]
    assert kept == [("bert", "fp32", True, 1e-3), ("torch", "bf16", True, 0.5)]
    assert ours.state[ps[1]]["exp_avg"].dtype == BF16


def test_hooks_see_what_is_loaded_and_may_replace_it():
    ps, qs = params_of((2,), dtype=BF16), params_of((2,), dtype=BF16)
    ours, theirs = optim.AdamW(ps), optim.AdamW(qs, lr=0.5)
    step(theirs)
    seen = []
    quarter = lambda groups: [{**group, "lr": 0.25} for group in groups]
    ours.register_load_state_dict_pre_hook(lambda _, saved: {**saved, "param_groups": quarter(saved["param_groups"])})
    ours.register_load_state_dict_post_hook(
        lambda _: seen.append((ours.param_groups[0]["lr"], ours.state[ps[0]]["exp_avg"].dtype))
    )
    ours.load_state_dict(theirs.state_dict())
    assert seen == [(0.25, F32)]


def unfit_dicts():
    amsgrad = torch.optim.AdamW(params_of((3, 2), (4,)), amsgrad=True, lr=0.5)
    turned = optim.AdamW(params_of((3, 2), (2, 2)), lr=0.5)
    transposed = optim.AdamW(params_of((2, 3), (4,)), lr=0.5)
    fewer = optim.AdamW(params_of((3, 2)), lr=0.5)
    for optimizer in (amsgrad, turned, transposed, fewer):
        step(optimizer)
    return {
        "amsgrad is True: .* is not served here; torch.optim.Adam and AdamW have it": amsgrad,
        r"shape \[2, 2\], and a parameter of shape \[4\] needs \[4\]": turned,
        r"shape \[2, 3\], and a parameter of shape \[3, 2\]": transposed,
        r"saved groups have \[1\] parameters and this optimizer's \[2\]": fewer,
    }


@pytest.mark.parametrize("message, other", unfit_dicts().items(), ids=["amsgrad", "dimensions", "transposed", "fewer"])
def test_a_state_dict_that_does_not_fit_changes_nothing(message, other):
    optimizer = optim.AdamW(params_of((3, 2), (4,)))
    step(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    assert_same(before, snapshot(optimizer))


def test_adafactors_of_others_load_into_their_own_variant_alone():
    theirs = {
        "torch": torch.optim.Adafactor(params_of((3, 2))),
        "huggingface": transformers.optimization.Adafactor(params_of((3, 2))),
    }
    for variant, optimizer in theirs.items():
        step(optimizer)
        for mine in ("t5", "huggingface", "torch"):
            ours = optim.Adafactor(params_of((3, 2)), variant=mine)
            if mine == variant:
                ours.load_state_dict(optimizer.state_dict())
                continue
            with pytest.raises(ValueError, match=f"this is variant '{mine}'; build it with variant='{variant}'"):
                ours.load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Copies, groups, devices, dtypes


def test_copies_share_a_process_group_and_pickles_leave_it_out(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        optimizer = optim.AdamW(params_of((3,)), process_group=dist.group.WORLD, max_grad_norm=0.5)
        step(optimizer)
        copied, thawed = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
        assert copied.process_group is dist.group.WORLD and thawed.process_group is None
        assert_same(snapshot(copied), snapshot(optimizer)), assert_same(snapshot(thawed), snapshot(optimizer))
        assert copied.grad_norm is None and thawed.max_grad_norm == 0.5
        step(copied), step(optimizer)
        assert_same(snapshot(copied), snapshot(optimizer))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "option", [dict(max_grad_norm=0.5), dict(seed=3), dict(lr="x"), dict(betas=0.9), dict(lr=None)], ids=str
)
def test_a_group_that_is_refused_is_not_added(option):
    optimizer = optim.AdamW(params_of((2,)))
    with pytest.raises(ValueError, match=f"{next(iter(option))} (is|are) {next(iter(option.values()))!r}"):
        optimizer.add_param_group({"params": params_of((3,)), **option})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params_of((3,)), "max_grad_norm": None, "seed": 0})  # what wrappers hand on
    assert not {"max_grad_norm", "seed"} & optimizer.param_groups[1].keys()


def test_each_device_is_stepped_and_its_norm_taken_by_itself(monkeypatch):
    """A meta device stands for a second one; its norm is 4, as no kernel there could say."""
    (here,), there = params_of((2,)), nn.Parameter(torch.ones(2, device="meta"))
    here.grad, there.grad = torch.tensor([3.0, 0.0]), torch.ones(2, device="meta")
    stats, looked_at, updates = sharding.grad_stats, [], []

    def of_one_device(grads, *rest):
        devices = {g.device.type for g in grads}
        looked_at.append(devices)
        return torch.tensor([4.0, 1.0, 0.0]) if devices == {"meta"} else stats(grads, *rest)

    def update(group, part, *tensors):
        updates.append({x.device.type for x in (*part.params, *part.steps, *tensors)})

    optimizer = optim.SGD([here, there], lr=1.0, max_grad_norm=1.0)
    monkeypatch.setattr(sharding, "grad_stats", of_one_device)
    monkeypatch.setattr(optimizer, "update", update)
    optimizer.step()
    assert looked_at == [{"cpu"}, {"meta"}] and updates == [{"cpu"}, {"meta"}] and optimizer.grad_norm == 5


def test_adafactor_takes_dtypes_in_the_order_of_the_parameters(monkeypatch):
    """Every rank must come to its collectives in the same order, which that of a set is not."""
    for dtypes in ((F32, BF16), (BF16, F32)):
        seen = []
        monkeypatch.setattr(
            sharding, "apply", lambda op, rules, shapes, shards, params, *rest, seen=seen: seen.append(params[0].dtype)
        )
        step(optim.Adafactor([nn.Parameter(torch.ones(2, 2, dtype=dtype)) for dtype in dtypes], variant="torch"))
        assert tuple(seen) == dtypes


def test_an_infinite_bound_gives_the_norm_and_clips_nothing():
    ends = []
    for bound in (None, float("inf")):
        optimizer = optim.AdamW(params_of((3,)), max_grad_norm=bound)
        step(optimizer)
        ends.append(snapshot(optimizer))
    assert_same(*ends)
    torch.testing.assert_close(optimizer.grad_norm, optimizer.param_groups[0]["params"][0].grad.norm())


def test_the_eps_of_adamw_is_that_of_its_form():
    eps = lambda **options: optim.AdamW(params_of((2,)), **options).param_groups[0]["eps"]
    assert (eps(), eps(scale_by_rms=True), eps(scale_by_rms=True, eps=1e-4)) == (1e-8, 1e-6, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

REFUSED = [
    ("adamw", dict(lr="1e-3"), "lr is '1e-3'; give one number .YAML reads 1e-3 as a string"),
    ("adam", dict(lr=True), "lr is True; give one number"),
    ("lamb", dict(eps="1e-6"), "eps is '1e-6'; give a finite number of at least 0 .YAML reads 1e-3 as a string"),
    ("adamw", dict(lr=None), "lr is None; give one number"),
    ("adamw", dict(lr=float("inf")), "lr is inf; give a finite number of at least 0"),
    ("adamw", dict(lr=torch.ones(2)), r"lr is tensor\(\[1., 1.\]\); give one number"),
    ("adamw", dict(betas=0.9), r"betas are 0.9; give two, each in \[0, 1\)"),
    ("adamw", dict(betas=("a", 0.9)), r"betas are \('a', 0.9\); give two"),
    ("adam", dict(eps=None), "eps is None; give a finite number"),
    ("adamw", dict(scale_by_rms="yes"), "scale_by_rms is 'yes'; give True or False"),
    ("adamw", dict(max_grad_norm="1"), "max_grad_norm is '1'; give a positive number"),
    ("adamw", dict(seed=1.5), "seed is 1.5; give a whole number of at least 0"),
    ("adamw", dict(seed=True), "seed is True; give a whole number of at least 0"),
    ("adamw", dict(process_group=3), "process_group is 3; give a group of torch.distributed"),
    ("sgd", dict(momentum="x"), "momentum is 'x'"),
    ("sgd", dict(dampening=None), "dampening is None; give a finite number"),
    ("sgd", dict(maximize=1), "maximize is 1; give True or False"),
    ("lamb", dict(bounds=3), r"bounds are 3; give \(low, high\)"),
    ("lamb", dict(bounds=(0, 1, 2)), r"bounds are \(0, 1, 2\); give \(low, high\)"),
    ("lamb", dict(bounds=(0.1, 1.0), variant="google"), "variant 'google' has none; \"paper\" and \"deepspeed\" have"),
    ("lamb", dict(bounds=(0.1, 1.0), variant="apex"), "variant 'apex' has none"),
    ("adafactor", dict(eps=1e-30), "eps are 1e-30; give two of at least 0"),
    ("adafactor", dict(eps=(1e-30,)), r"eps are \(1e-30,\); give two"),
    ("adafactor", dict(eps=(None, 1e-3)), "in variant \"torch\" alone: give a number"),
    ("adafactor", dict(clip_threshold="1"), "clip_threshold is '1'; give a positive"),
    ("adafactor", dict(beta2_decay=0.8), "beta2_decay is 0.8; give the exponent of t, at most 0"),
    ("adafactor", dict(min_dim_size_to_factor=-3), "min_dim_size_to_factor is -3; give a whole number of at least 0"),
    ("adafactor", dict(decay_offset=-5), "decay_offset is -5"),
    ("adafactor", dict(beta1=1.0), r"beta1 is 1.0; give a number in \[0, 1\)"),
    ("adafactor", dict(d=2.0, clip_threshold=0.5), "d=2.0 and clip_threshold=0.5 are one option"),
    ("adafactor", dict(beta2_decay=-0.5, decay_rate=-0.7), "are one option"),
    ("adafactor", dict(variant="torch", relative_step=True), "variant \"torch\" has none: its lr bounds 1/√t"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, message", REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_values_that_make_no_sense_are_named_with_their_cure(name, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        optim.OPTIMIZERS[name](params_of((2,)), **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "make, name, cure",
    [
        (optim.AdamW, "use_nvlamb", "adapt=True"),
        (optim.Adam, "max_coeff", "bounds="),
        (optim.SGD, "bias_correction", 'LAMB\'s "google"'),
        (optim.SGD, "moment", "'moment'$"),
    ],
)
def test_unknown_arguments_name_the_class_and_what_it_has_instead(make, name, cure):
    with pytest.raises(TypeError, match=f"{make.__name__} has no argument '{name}'") as refused:
        make(params_of((2,)), **{name: 1})
    assert refused.match(cure)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_parameters_that_are_not_served_are_named(name):
    cases = {
        r"\[3, 3\] is sparse \(torch.sparse_coo\).*to_dense": torch.eye(3).to_sparse(),
        r"\[3, 3\] is sparse \(torch.sparse_csr\)": torch.eye(3).to_sparse_csr(),
        r"\[2\] is torch.int64; fastlm's optimizers take fp32, bf16 and fp16": torch.zeros(2, dtype=torch.int64),
        r"\[2\] is torch.float8_e4m3fn": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    for message, value in cases.items():
        with pytest.raises(ValueError, match=message):
            optim.OPTIMIZERS[name]([nn.Parameter(value, requires_grad=False)])


# ---------------------------------------------------------------------------------------------------------------------
# Groups and memory


def test_berts_recipe_knows_biases_by_every_name():
    model = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.LSTM(3, 2)])
    decayed, free = optim.decay_groups(model, 0.1, "bert")
    assert {p for name, p in model.named_parameters() if "bias" in name} == set(free["params"])
    assert all(p.ndim == 2 for p in decayed["params"])


def test_groups_refuse_what_makes_no_sense():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"weight_decay is -0.1; give"):
        optim.decay_groups(model, -0.1)
    for layer_decay in (2, -1, 0):
        with pytest.raises(ValueError, match=f"layer_decay is {layer_decay}; (give a positive|it is at most 1)"):
            optim.layer_groups(model, 1e-3, layer_decay, 0.1)


def test_the_memory_table_names_what_it_does_not_know():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="optimizer is 'lion'; choose from 'adafactor', 'adam'"):
        optim.memory_table(model, ("adamw", "lion"))
    assert not any(row.chosen for row in optim.memory_table(model, chosen=torch.optim.AdamW(model.parameters())))
    assert [row.optimizer for row in optim.memory_table(model, "adamw")] == ["adamw"]


def test_the_memory_table_suits_small_models_and_frozen_ones():
    model = nn.Sequential(nn.Linear(9, 10), nn.Linear(10, 90))
    model[1].requires_grad_(False)
    table = optim.memory_table(model, "adamw")
    total = 4 * 1090 + 4 * 100 + 8 * 100 + 8  # all parameters; gradients, moments and steps of the first layer
    assert table[0].total == total and str(table).splitlines()[0].split()[-2:] == ["kB", "bytes/param"]
    assert str(table).splitlines()[1].split()[-2:] == [f"{total / 1e3:.1f}", f"{total / 1090:.2f}"]
    assert "total B " in str(optim.memory_table(nn.Linear(3, 2)))
