"""What the optimizers' ops share: a definition over named tuples, the flat schema that torch.library takes instead, and
one launcher for all.

    class SgdUpdate(NamedTuple): ...     the tensors of one update, lists with one entry for each parameter
    class SgdOptions(NamedTuple): ...    its numbers; csrc/rules has a struct of the same name and fields

    @UpdateOp
    def sgd(update: SgdUpdate, options: SgdOptions) -> None: ...

is called sgd(*update, *options). Every update has the fields of UPDATE (csrc/rules/lists.h: Update), and besides them
the optimizer's states:

    params                  fp32, bf16 or fp16, each tensor by itself
    masters, keys           what completes 16-bit parameters, see precision.py; empty, or one for each
    grads                   fp32, bf16 or fp16, each tensor by itself; only read
    steps                   fp32 scalars: how many updates there were
    coefficient             fp32 scalar that multiplies every gradient: unscales, clips; None for 1
    found_inf               fp32 scalar; ≠ 0 leaves every bit of all the others as it was; None for 0

Nothing is read back to the host.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import Op
from fastlm.backends.native import address
from fastlm.backends.signature import Signature
from fastlm.ops.optim.lists import addresses, cpp_list, dense, fp32, laid_out, refuses_lists, with_shapes, write_back

UPDATE = ("params", "masters", "keys", "grads", "steps", "coefficient", "found_inf")


class UpdateOp(Op):
    """The op of a definition whose arguments are annotated with named tuples: the update, then options.

    Its schema is their fields in order; every list of tensors is written, but for the gradients.
    """

    factors: tuple[str, ...] = ()  # fp32 states that are not shaped like their parameters: `factor_shapes`
    row_major = False  # whether what is computed depends on the order of elements

    def __init__(self, definition: Callable[..., None]):
        self._tuples = Signature(definition)
        fields = inspect.signature(self._tuples.flat).parameters
        lists = [name for name, field in fields.items() if field.annotation == list[Tensor]]
        self.states = [name for name in lists if name not in UPDATE]

        @functools.wraps(definition)
        def flat(*args):
            definition(*self.named(args))

        flat.__signature__ = inspect.signature(self._tuples.flat)
        written = tuple(name for name in lists if name != "grads")
        super().__init__(flat, mutates=written)
        self.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=self._refuses)(self._cpp)
        self.backend("cuda", devices=("cuda",), unavailable=native.cuda_missing, refuses=self._refuses)(self._cuda)

    def named(self, args: tuple) -> tuple[NamedTuple, ...]:
        """Flat arguments as the named tuples that the definition takes."""
        return self._tuples.unflatten(args)

    def sizes(self, update: Any) -> list:
        """What the launcher wants to know of each parameter's size: its number of elements."""
        return [p.numel() for p in update.params]

    def factor_shapes(self, shapes: list[torch.Size], sizes: list) -> dict[str, list]:
        """The shape of every tensor of each list of `factors`, for parameters of these shapes and sizes."""
        return {}

    # -----------------------------------------------------------------------------------------------------------------
    # Backends

    def _refuses(self, *args) -> str | None:
        update = self.named(args)[0]
        lists = ("params", "grads", *(name for name in self.states if name not in self.factors))
        return refuses_lists(**{name: getattr(update, name) for name in lists})

    def _cpp(self, *args) -> None:
        self.launch(native.cpu(), args, (torch.get_num_threads(),))

    def _cuda(self, *args) -> None:
        update = self.named(args)[0]
        workspace = native.cuda_workspace(self.name, update.params, self.sizes(update))
        stream = native.cuda_stream(update.params[0].device)
        self.launch(native.cuda(), args, (workspace.data_ptr(), *stream))

    def launch(self, module: ModuleType, args: tuple, where: tuple) -> None:
        """The update by this op's launcher in `module` (csrc/cpu/launch.h, csrc/cuda/launch.h). where: the number of
        threads, or the workspace, device and stream.
        """
        original, *options = self.named(args)
        sizes = self.sizes(original)
        update = self._laid_out(original, sizes)
        head = module.Update(
            cpp_list(update.params), cpp_list(update.masters), update.keys, cpp_list(update.grads),
            addresses(update.steps), address(update.coefficient), address(update.found_inf),
        )  # fmt: skip
        states = [(addresses if name in self.factors else cpp_list)(getattr(update, name)) for name in self.states]
        structs = [getattr(module, type(each).__name__)(*each) for each in options]
        getattr(module, self.name)(head, sizes, *states, *structs, *where)
        for name in ("params", "masters", *self.states):
            write_back(getattr(original, name), getattr(update, name))

    def _laid_out(self, update: Any, sizes: list) -> Any:
        """The update with the elements of a parameter and of what belongs to it in one order without gaps: each
        parameter's own, or row-major where that matters, as it does to noise, which is drawn by element.

        Raises ValueError where a tensor is not shaped as its parameter needs it: a launcher is given addresses.
        """
        row_major = self.row_major or bool(update.keys) or all(p.is_contiguous() for p in update.params)
        params = [p.contiguous() if row_major else dense(p) for p in update.params]
        shapes = [p.shape for p in params]
        device = params[0].device if params else None
        lists = {}
        for name in ("masters", "grads", *self.states):
            tensors = getattr(update, name)
            if name not in self.factors and tensors:
                pairs = zip(with_shapes(name, tensors, shapes), params, strict=True)
                lists[name] = [x.contiguous() if row_major else laid_out(x, p.stride()) for x, p in pairs]
        for name, needed in self.factor_shapes(shapes, sizes).items():
            lists[name] = [x.contiguous() for x in fp32(name, getattr(update, name), needed, device)]
        fp32("steps", update.steps, [()] * len(params), device)
        return update._replace(params=params, **lists)
