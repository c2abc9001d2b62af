"""Options and state dicts of the optimizers that ours stand in for: torch's, apex's, DeepSpeed's and Hugging Face's.

An option that ours lacks is taken where it says what ours does anyway, and else refused in words, wherever it is given:
as an argument, in a parameter group, or in a group of a state dict. What ours does depends on the class and its group
(`Optimizer.fixed`).
"""

from collections.abc import Iterable

HARMLESS = ("foreach", "capturable", "set_grad_none", "materialize_master_grads")  # they change no number
CURES = {  # what there is instead
    "amsgrad": "the largest of the past second moments, in the place of their average (Reddi et al. 2018), is not "
    "served here; torch.optim.Adam and AdamW have it",
    "differentiable": "a step that autograd sees through is not served here; torch.optim has it",
    "master_weights": 'give master="fp32", which keeps fp32 copies of parameters of 16 bits',
    "bias_correction": 'AdamW\'s variant="bert" and LAMB\'s "google" go without, and all else with it',
    "correct_bias": 'AdamW\'s variant="bert" goes without, and all else with it',
    "adam_w_mode": "weight decay apart from the gradient is AdamW, and as a part of it Adam",
    "decoupled_weight_decay": "weight decay apart from the gradient is AdamW, and as a part of it Adam; give one of "
    "these, or weight_decay=0",
    "variant": "AdamW has variants, and Adam none",
    "scale_by_rms": "AdamW has it, and Adam has not",
    "grad_averaging": "the first moment is an average here, (1 - β₁) of each gradient, and never a sum",
    "eps_inside_sqrt": "eps is added to the root here",
    "use_nvlamb": "adapt=True scales groups without decay too, and None leaves them to the variant",
    "max_coeff": 'give variant="deepspeed" and bounds=(min_coeff, max_coeff)',
    "min_coeff": 'give variant="deepspeed" and bounds=(min_coeff, max_coeff)',
    "wd_after_momentum": "weight decay joins the gradient before the momentum here, as torch's does",
    "max_grad_norm": "it is of all groups; give the same to the optimizer itself, or take it out of the saved groups",
}
OWNERS = {  # whose an option in a saved group is
    "momentum": ("SGD",),
    "betas": ("Adam", "AdamW", "LAMB"),
    "decoupled_weight_decay": ("Adam", "AdamW"),
    "scale_by_rms": ("AdamW",),
    "adapt": ("LAMB",),
    "grad_averaging": ("LAMB",),
    "clip_threshold": ("Adafactor",),
    "beta2_decay": ("Adafactor",),
    "momentum_decay": ("NAdam",),
    "centered": ("RMSprop",),
    "lr_decay": ("Adagrad",),
    "rho": ("Adadelta",),
    "lambd": ("ASGD",),
    "etas": ("Rprop",),
}

LAMBS = {"adapt", "grad_averaging", "max_coeff"}  # options of LAMB's groups: ours, apex's FusedLAMB's, DeepSpeed's


def check_arguments(name: str, arguments: Iterable[str], fixed: dict) -> None:
    """Raise TypeError for an argument that an optimizer of this name and its namesakes lack."""
    for argument in arguments:
        if argument not in HARMLESS and argument not in fixed:
            cure = f": {CURES[argument]}" if argument in CURES else ""
            raise TypeError(f"{name} has no argument {argument!r}{cure}")


def check_options(options: dict, fixed: dict) -> None:
    """Raise ValueError for an option that has one value here and is given another; None gives none."""
    for name, value in fixed.items():
        if options.get(name) not in (None, value):
            raise ValueError(f"{name} is {options[name]!r}: {CURES[name]}")


def check_owner(cls: type, state_dict: dict, known: Iterable[str]) -> None:
    """Raise ValueError if a state dict, loaded into this class with these options, is no optimizer's or another's."""
    if not {"state", "param_groups"} <= state_dict.keys():
        has = ", ".join(map(repr, list(state_dict)[:3])) or "nothing"
        raise ValueError(f"the state dict has {has}; give an optimizer's, which has 'state' and 'param_groups'")
    names, groups = {each.__name__ for each in cls.__mro__}, state_dict["param_groups"]
    for option in (option for group in groups for option in group if option in OWNERS and option not in known):
        if names.isdisjoint(OWNERS[option]):
            raise ValueError(
                f"a saved group has {option!r}, which {' or '.join(OWNERS[option])} has and {cls.__name__} has not; "
                "load the state dict into the class that saved it, or train on without it"
            )
    if any("decoupled_weight_decay" in group and "amsgrad" not in group for group in groups):
        raise ValueError(f"the saved groups are RAdam's, and this is {cls.__name__}; build torch.optim.RAdam for them")
    of_fused_adam = ["bias_correction" in group and LAMBS.isdisjoint(group) for group in groups]
    if "LAMB" in names and any(of_fused_adam):
        raise ValueError(
            "the saved groups are those of apex's FusedAdam, and this is LAMB; "
            "load the state dict into the class that saved it, or train on without it"
        )


def check_state(name: str, values: dict, needed: Iterable[str]) -> None:
    """Raise ValueError if a parameter's saved state, loaded into an optimizer of this name, is another's. Something may
    be missing, as momentum that was switched on since.
    """
    missing = [each for each in needed if each not in values]
    if values and ("step" in missing or (missing and not values.keys() <= {*needed})):
        raise ValueError(
            f"a saved state has {', '.join(map(repr, values))} and {name} needs {', '.join(map(repr, needed))}; "
            "load the state dict into the class that saved it, or train on without it"
        )
