"""Second derivatives of attention, and all after them: autograd's, through the definition, which keeps L×L tensors.

So they are made where the definition was asked for, under `use_backend("reference")`, and refused elsewhere."""

import torch
from torch import Tensor

from fastlm.backends.dispatch import REFERENCE, BackendError, forced_backend
from fastlm.ops.attention import attention_backward

ONCE = 'attention is differentiable once, and more often under fastlm.use_backend("reference"), whose tensors are L×L'


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]


@attention_backward.gradient(save=_save)
def _(ctx, grads):
    if forced_backend(attention_backward.name) != REFERENCE:
        raise BackendError(ONCE)
    with torch.enable_grad():  # views, so that gradients stop at these arguments and not at what they were made from
        inputs = [n if x is None else x.view_as(x) for x, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        made = zip(attention_backward.definition(*inputs), grads, strict=True)
        made, grads = zip(*((x, grad) for x, grad in made if x.requires_grad), strict=True)
    wanted = [x for x, want in zip(inputs, ctx.needs_input_grad, strict=True) if want is True]
    found = torch.autograd.grad(made, wanted, grads, create_graph=torch.is_grad_enabled(), allow_unused=True)
    found = iter(found)
    return tuple(next(found) if want is True else None for want in ctx.needs_input_grad)
