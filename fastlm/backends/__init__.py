"""Who computes: the one place that chooses among an operation's backends, and what this machine can run.

    dispatch.py    Op: a definition and the backends beneath it; use_backend; the choice
    eager.py       who looks on at a call, and calls at which nobody does, without torch.library's operator
    signature.py   arguments by name, as an Op takes them, and one by one, as torch.library does
    native.py      the compiled extensions and Triton: whether they are here, why not, and the cure
    pages.py       large zeros on a CPU, in the system's large pages
    philox.py      counter-based random bits that every backend makes alike
    splitmix.py    the same for arrays without torch
    info.py        what `fastlm info` says

A backend is added where its op is: `@op.backend("name", devices=...)` in fastlm/ops.
"""
