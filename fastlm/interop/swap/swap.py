"""The call: what of a model fastlm can answer for, exchanged and brought back."""

import functools
import inspect
import re
import sys

from torch import nn

from fastlm.checks import flag
from fastlm.interop.attention import NAME, register
from fastlm.interop.swap import bert, bloom, deberta, mpt, t5, torch_attention, xlnet
from fastlm.interop.swap.embeddings import swap_embeddings
from fastlm.interop.swap.linears import swap_linears
from fastlm.interop.swap.losses import swap_losses
from fastlm.interop.swap.masks import before_5
from fastlm.interop.swap.norms import PlainNorm, is_norm, kind_of
from fastlm.interop.swap.report import Report
from fastlm.interop.swap.rotary import Rotating, function_of
from fastlm.interop.swap.rotary import refusal as turns_otherwise
from fastlm.interop.swap.served import WRAPPED, Served, exchange, is_served, is_wrapped, restore

FAMILIES: tuple[type[Served], ...] = (
    t5.UMT5Attention, t5.T5Attention, t5.Stack, bloom.BloomAttention, bloom.BloomModel, mpt.MptAttention, mpt.MptModel,
    deberta.SelfAttention, deberta.FirstSelfAttention, deberta.Encoder, xlnet.RelativeAttention, xlnet.Model,
    bert.SelfAttention, torch_attention.TorchAttention,
)  # fmt: skip
BY_NAME = {name: served for served in FAMILIES for name in served.names}
INSIDE = {part for served in FAMILIES for part in served.parts}  # who is swapped with what stands around it alone
BEFORE = "_attention_before_swap"  # of a model whose config was changed: the implementation that it named
# What sources call that make a mask of each pair themselves, and what those call that ask the attention interface.
DENSE = re.compile(r"_prepare_4d_\w*mask|get_extended_attention_mask|_update_causal_mask")
ASKING = re.compile(r"create_\w*causal_mask\w*\(")


def swap(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    rotary: bool = True,
    embeddings: bool = True,
    loss: bool = True,
    linears: bool = False,
) -> Report:
    """Let fastlm answer for what it knows in a model of transformers, in place, with the model's own parameters.

    T5, mT5, UMT5, BLOOM, MPT, DeBERTa (v1 to v3), XLNet, and before transformers 5 BERT with relative positions, then
    build no tensor of L×L for these. torch.nn.MultiheadAttention makes one where weights are asked for alone. Models
    that go through transformers' attention interface get attn_implementation="fastlm".

    Names, parameters, state dict, hooks, optimizers and what `save_pretrained` writes stay as they are; a copy or a
    pickle is swapped too. What a swapped module cannot do, such as output_attentions, it refuses in words when it is
    asked to.

    Args:
        model: any module; what is known is looked for among all its modules.
        attention: whether attention is swapped. Default True.
        norms: whether RMS norms are swapped, of any class that computes one (norms.py): they are then a pass each way.
            Layer norms stay: PyTorch's are that already. Default True.
        rotary: whether rotary embedding is swapped, by any function that computes one (rotary.py): it is then a pass
            each way too, in fp32 inside whatever the dtype. Before transformers 5 it stays. Default True.
        embeddings: whether torch's embeddings of 16 bits, or of 32 MiB and more, are swapped. Default True.
        loss: whether models that predict words compute their loss without logits while they train with labels=; their
            output has None for logits then. It saves memory, and time where few positions have a label. A model or a
            loss function that looks at the logits gets them. Default True.
        linears: whether linear layers are swapped, which pays where a text is written on a CPU: fastlm.nn.linear. Their
            class is then another, which tools that replace torch.nn.Linear by its type do not know. Default False.

    Returns:
        `Report`, to be printed: what was swapped, what was not, and why.

    Raises:
        ValueError: for arguments of other types.

    Padding may stand on either side. Queries that see no key give zeros, and what comes out at padding is therefore not
    what it was. Dropout drops other probabilities than torch's generator would.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    flag(attention=attention, norms=norms, rotary=rotary, embeddings=embeddings, loss=loss, linears=linears)
    report = Report()
    names = {module: name for name, module in model.named_modules()}
    if attention:
        _swap_families(names, report)
        _swap_interfaces(names, report)
        _tell_of_the_rest(names, report)
    if norms:
        _swap_norms(names, report)
    if rotary:
        _swap_rotary(names, report)
    if embeddings:
        swap_embeddings(names, report)
    if loss:
        swap_losses({model: name for model, name in names.items() if _is_model(model)}, report)
    if linears:
        swap_linears(names, report)
    return report


def unswap(model: nn.Module) -> None:
    """Undo `swap`: every module has its own forward again, and every config its attention implementation.

    Args:
        model: as it was given to `swap`, or a copy of that.

    Raises:
        ValueError: where something was put around a swapped forward since, with what to undo first; nothing is undone.
    """
    modules = list(model.modules())
    for name, module in model.named_modules():
        if isinstance(module, Served) and (not is_served(module) or is_wrapped(module)):
            raise ValueError(f"{name or 'the model'} was wrapped after fastlm.swap; take the wrapper off first")
    for module in modules:
        if BEFORE in vars(module):
            module.config._attn_implementation_internal = vars(module).pop(BEFORE)
        if isinstance(module, Served):
            restore(module)


# ---------------------------------------------------------------------------------------------------------------------
# Modules that are known by their class


def _swap_families(names: dict[nn.Module, str], report: Report) -> None:
    """A stack and all of its attention, or neither: its masks are for those who know them."""
    for stack in names:
        known = _known(stack)
        if known is None or known in INSIDE:
            continue
        parts = {part: names[part] for part in stack.modules() if _known(part)}
        reasons = {label: why for part, label in parts.items() if (why := _refusal(part, _served(part)))}
        if reasons:
            first = next(iter(reasons))
            beside = f"{first} cannot be: {reasons[first]}"
            report.kept += [(label, reasons.get(label, beside)) for label in parts.values()]
            continue
        for part, label in parts.items():
            if not is_served(part):
                exchange(part, _served(part))
            report.swapped.append((label, type(part).how))
        if type(stack).by_interface and not before_5():
            register()
            _name_ours(stack)


def _served(module: nn.Module) -> type[Served] | None:
    """Who answers for the attention of modules of this class, or for what hands it its masks."""
    served = type(module).served if is_served(module) else BY_NAME.get(_qualified(type(module)))
    return served if served in FAMILIES and not (served.only_before_5 and not before_5()) else None


def _known(module: nn.Module) -> type[Served] | None:
    """Who answers for modules of this class, or for those of the class that it extends."""
    base = _extends(module)
    return _served(module) or (None if base is None else BY_NAME[_qualified(base)])


def _extends(module: nn.Module) -> type | None:
    """The known class that a module's own class derives from, unless that is fastlm's."""
    bases = () if _is_ours(module) else type(module).__mro__[1:]
    return next((base for base in bases if _qualified(base) in BY_NAME), None)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastlm.")


def _refusal(module: nn.Module, served: type[Served] | None) -> str | None:
    if is_served(module):
        return None
    if served is None:
        return f"{type(module).__name__} extends {_extends(module).__name__}, and may compute something else"
    if is_wrapped(module):
        return WRAPPED
    return served.refusal(module)


def _name_ours(model: nn.Module) -> None:
    if model.config._attn_implementation_internal != NAME:
        setattr(model, BEFORE, model.config._attn_implementation_internal)
        model.config._attn_implementation_internal = NAME


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# ---------------------------------------------------------------------------------------------------------------------
# Models that ask transformers' attention interface


def _swap_interfaces(names: dict[nn.Module, str], report: Report) -> None:
    done: set[nn.Module] = set()
    for model, name in names.items():
        if model in done or not _is_model(model):
            continue
        parts = list(model.modules())
        if any(known and not known.anywhere for known in map(_known, parts)):  # beside it may be another model
            continue
        done.update(parts)
        models = [part for part in parts if _is_model(part)]
        before = {part: part.config._attn_implementation_internal for part in models}
        register()
        try:
            if before_5() and (makes := next(filter(_makes_masks, models), None)):
                raise NotImplementedError(f"{type(makes).__name__} makes a mask of each pair itself")
            model.set_attn_implementation(NAME)
        except (NotImplementedError, ValueError) as refusal:
            for part, implementation in before.items():
                part.config._attn_implementation_internal = implementation
            report.kept.append((name, str(refusal).split("; ")[0]))
            continue
        for part, implementation in before.items():
            if implementation != NAME and part.config._attn_implementation_internal == NAME:
                setattr(part, BEFORE, implementation)
        report.swapped.append((name, f"attn_implementation={NAME!r}"))


def _is_model(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _makes_masks(model: nn.Module) -> bool:
    """Whether its source makes masks of each pair. Source that cannot be read, as in a notebook, makes none."""
    try:
        source = inspect.getsource(sys.modules[type(model).__module__])
    except (KeyError, OSError, TypeError):
        return False
    return DENSE.search(source) is not None and ASKING.search(source) is None


# ---------------------------------------------------------------------------------------------------------------------
# The rest


def _tell_of_the_rest(names: dict[nn.Module, str], report: Report) -> None:
    """Attention that nothing above has met, by the names of classes."""
    told = {name for name, _ in report.swapped + report.kept}
    met = {part for module, name in names.items() if name in told for part in module.modules()}
    for module, name in names.items():
        attends = [part for part in module.modules() if "Attention" in type(part).__name__]
        if module in met or attends != [module] or _is_ours(module):
            continue
        report.kept.append((name, f"fastlm does not know {type(module).__name__}"))


# ---------------------------------------------------------------------------------------------------------------------
# Norms


def _swap_norms(names: dict[nn.Module, str], report: Report) -> None:
    for module, name in names.items():
        if isinstance(module, PlainNorm):
            report.swapped.append((name, module.how))
        elif _is_ours(module) or not is_norm(module):
            continue
        elif is_wrapped(module):
            report.kept.append((name, WRAPPED))
        elif kind := kind_of(module):
            exchange(module, kind)
            report.swapped.append((name, kind.how))
        elif type(module).__name__.endswith("RMSNorm"):
            report.kept.append(
                (name, f"{type(module).__name__} computes something else than an RMS norm by its weight")
            )


# ---------------------------------------------------------------------------------------------------------------------
# Rotary embedding


def _swap_rotary(names: dict[nn.Module, str], report: Report) -> None:
    refused = functools.cache(lambda attention: turns_otherwise(attention, names))  # once a class, not once a layer
    for module, name in names.items():
        if isinstance(module, Rotating):
            report.swapped.append((name, module.how))
        elif is_served(module) or _is_ours(module) or not function_of(type(module)) or before_5():
            continue
        elif why := WRAPPED if is_wrapped(module) else refused(type(module)):
            report.kept.append((name, why))
        else:
            exchange(module, Rotating)
            report.swapped.append((name, Rotating.how))
