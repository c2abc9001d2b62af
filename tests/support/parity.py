"""A model of transformers and one of ours with the same weights: what both compute, and every parameter's gradient."""

import torch


def spread(model) -> None:
    """Draw every parameter wide, norms near one, so that no term is too small to be seen."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = p.ndim == 1 and name.endswith("weight")
            p.copy_(torch.randn(p.shape) * (0.1 if is_norm or p.ndim == 1 else 0.25) + is_norm)


def gradients_agree(theirs, ours, parts, atol=1e-4) -> None:
    """That every parameter has a gradient on both sides or on neither, and the same one."""
    mine, known = dict(ours.named_parameters()), dict(theirs.named_parameters())
    seen = set()
    for part in parts:
        seen.add(part.theirs)
        p, q = known[part.theirs], mine[part.ours]
        assert (p.grad is None) == (q.grad is None), part.theirs
        if p.grad is not None:
            torch.testing.assert_close(q.grad[part.rows], part.back(p.grad), rtol=1e-4, atol=atol, msg=part.theirs)
    missing = {name for name, p in known.items() if p.grad is not None} - seen
    assert not missing, missing
