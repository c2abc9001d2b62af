"""Ops that a test makes for itself."""

from fastlm.backends import dispatch


def forget(op: dispatch.Op) -> None:
    """Undo `@op`."""
    del dispatch.OPS[op.name]
    op.torch_op._lib._destroy()
