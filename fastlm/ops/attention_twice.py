"""Second derivatives of attention, and all after them: autograd's, through the definition, which keeps L×L tensors.

So they are made where the definition was asked for, under `use_backend("reference")`, and refused elsewhere.
"""

import torch
from torch import Tensor

from fastlm.backends.dispatch import REFERENCE, BackendError, forced_backend
from fastlm.ops.attention import TENSORS, Arguments, attention_backward

ONCE = 'attention is differentiable once, and more often under fastlm.use_backend("reference"), whose tensors are L×L'


def _save(ctx, inputs, output):
    *first, a, ctx.needs_grad = inputs
    ctx.save_for_backward(*first, *(getattr(a, name) for name in TENSORS))
    ctx.numbers = a._replace(**dict.fromkeys(TENSORS))


@attention_backward.gradient(save=_save)
def _(ctx, grads):
    if forced_backend(attention_backward.name) != REFERENCE:
        raise BackendError(ONCE)
    with torch.enable_grad():  # views, so that gradients stop at these tensors and not at what they were made from
        tensors = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
        made = attention_backward.definition(*_inputs(tensors, ctx.numbers), ctx.needs_grad)
    made, grads = zip(*((x, grad) for x, grad in zip(made, grads, strict=True) if x.requires_grad), strict=True)
    leaves = [x for x in tensors if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(made, leaves, grads, create_graph=torch.is_grad_enabled(), allow_unused=True))
    found = [next(found) if x is not None and x.requires_grad else None for x in tensors]
    return *_inputs(found, Arguments(**dict.fromkeys(Arguments._fields))), None


def _inputs(tensors: list[Tensor | None], numbers: Arguments) -> tuple:
    """attention_backward's inputs from its tensors side by side, and numbers."""
    first, rest = tensors[: -len(TENSORS)], tensors[-len(TENSORS) :]
    return *first, numbers._replace(**dict(zip(TENSORS, rest, strict=True)))
