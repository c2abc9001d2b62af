"""Every optimizer as its paper has it, in fp64 numpy, and the choices of class and options that must agree with it.

A formula is a function (θ, g, state, t) → θ for one tensor; state is a dict that it keeps. To cover a new variant, add
a row to CHOICES.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


def sgd(lr, momentum=0.0, dampening=0.0, decay=0.0, nesterov=False):
    def step(x, g, state, t):
        g = g + decay * x
        if momentum:
            b = state["b"] = g if t == 1 else momentum * state["b"] + (1 - dampening) * g
            g = g + momentum * b if nesterov else b
        return x - lr * g

    return step


def _moments(g, state, b1, b2):
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
    return state["m"], state["v"]


def adam(lr, b1, b2, eps, l2=0.0, decay=0.0, corrected=True):
    """Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2."""

    def step(x, g, state, t):
        m, v = _moments(g + l2 * x, state, b1, b2)
        if corrected:
            m, v = m / (1 - b1**t), v / (1 - b2**t)
        return x - lr * (m / (np.sqrt(v) + eps) + decay * x)

    return step


def adamw_scale(lr, b1, b2, eps, decay, corrected=True):
    """nanoT5's AdamWScale: Adam in the order of its paper's section 2, by RMS(θ); then the decay, of what came out and
    by lr alone.
    """

    def step(x, g, state, t):
        m, v = _moments(g, state, b1, b2)
        alpha = lr * max(1e-3, math.sqrt(np.mean(x * x))) * (math.sqrt(1 - b2**t) / (1 - b1**t) if corrected else 1.0)
        x = x - alpha * m / (np.sqrt(v) + eps)
        return x - lr * decay * x

    return step


def lamb(lr, b1, b2, eps, decay, correction, norm=(0.0, math.inf), ratio=(0.0, math.inf), adapt=True):
    """You et al. 2020, algorithm 2; correction: "none", "moments", or DeepSpeed's "step"."""

    def step(x, g, state, t):
        m, v = _moments(g, state, b1, b2)
        rate = lr
        if correction == "moments":
            m, v = m / (1 - b1**t), v / (1 - b2**t)
        elif correction == "step":
            rate = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        r = m / (np.sqrt(v) + eps) + decay * x
        x_norm, r_norm = np.clip(np.linalg.norm(x), *norm), np.linalg.norm(r)
        trust = np.clip(x_norm / r_norm, *ratio) if adapt and x_norm > 0 and r_norm > 0 else 1.0
        return x - rate * trust * r

    return step


def adafactor(
    dims=lambda shape: (-2, -1) if len(shape) > 1 else None, rho=lambda t: min(1e-2, 1 / math.sqrt(t)), added=1e-30,
    bound=0.0, eps2=1e-3,
    scale=None, clip=1.0, exponent=0.8, offset=0, b1=0.0, decay=lambda alpha: 0.0,
):  # fmt: skip
    """Shazeer & Stern 2018, algorithms 4 and 5; bound: torch's lower bound of √V. decay(α): what is taken of θ."""

    def step(x, g, state, t):
        beta = 1 - max(t - offset, 1) ** -exponent
        squares, factors = g * g + added, dims(x.shape)
        if factors is None:
            v = state["v"] = beta * state.get("v", 0.0) + (1 - beta) * squares
        else:
            n, m = factors
            state["r"] = beta * state.get("r", 0.0) + (1 - beta) * squares.mean(m, keepdims=True)
            state["c"] = beta * state.get("c", 0.0) + (1 - beta) * squares.mean(n, keepdims=True)
            v = state["r"] * state["c"] / np.maximum(state["r"].mean(n, keepdims=True), bound)
        u = g / np.sqrt(np.maximum(v, bound * bound))
        u = u / max(1.0, math.sqrt(np.mean(u * u)) / clip)
        alpha = rho(t) * (max(eps2, math.sqrt(np.mean(x * x))) if scale is None else scale)
        u = alpha * u
        if b1:
            u = state["u"] = b1 * state.get("u", 0.0) + (1 - b1) * u
        return x - decay(alpha) * x - u

    return step


@dataclass(frozen=True)
class Choice:
    """An optimizer of fastlm.optim with options, and what it must do."""

    optimizer: str
    options: dict
    formula: Callable
    shapes: tuple = ((7, 5), (4,), (), (3, 6, 4))
    scale: float = field(default=1.0)  # of the gradients

    def __str__(self) -> str:
        return f"{self.optimizer}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


BETAS = dict(betas=(0.9, 0.95))
RMS = dict(BETAS, eps=1e-3, weight_decay=0.1, scale_by_rms=True)  # eps so large that its place shows
LARGEST = lambda shape: (
    tuple(sorted(np.argsort(shape, kind="stable")[-2:])) if len(shape) > 1 and sorted(shape)[-2] >= 5 else None
)
T5 = dict(variant="t5", min_dim_size_to_factor=5)
HF = dict(variant="huggingface")
CHOICES = [
    Choice("sgd", dict(lr=0.1), sgd(0.1)),
    Choice("sgd", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1), sgd(0.1, 0.9, 0.3, 0.1)),
    Choice("sgd", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), sgd(0.1, 0.9, 0.0, 0.1, True)),
    Choice("adam", dict(lr=1e-2, **BETAS, weight_decay=0.1), adam(1e-2, 0.9, 0.95, 1e-8, l2=0.1)),
    Choice("adamw", dict(lr=1e-2, **BETAS, weight_decay=0.1), adam(1e-2, 0.9, 0.95, 1e-8, decay=0.1)),
    Choice(
        "adamw",
        dict(lr=1e-2, **BETAS, eps=1e-6, weight_decay=0.1, variant="bert"),
        adam(1e-2, 0.9, 0.95, 1e-6, decay=0.1, corrected=False),
    ),
    Choice("adamw", dict(lr=1e-2, **RMS, variant="bert"), adamw_scale(1e-2, 0.9, 0.95, 1e-3, 0.1, corrected=False)),
    Choice("adamw", dict(lr=1e-2, **RMS), adamw_scale(1e-2, 0.9, 0.95, 1e-3, 0.1)),
    Choice("lamb", dict(lr=1e-2, **BETAS, weight_decay=0.1), lamb(1e-2, 0.9, 0.95, 1e-6, 0.1, "moments")),
    Choice(
        "lamb",
        dict(lr=1e-2, **BETAS, weight_decay=0.1, bounds=(1.0, 2.0)),
        lamb(1e-2, 0.9, 0.95, 1e-6, 0.1, "moments", norm=(1.0, 2.0)),
    ),
    Choice(
        "lamb", dict(lr=1e-2, **BETAS, weight_decay=0.1, variant="google"), lamb(1e-2, 0.9, 0.95, 1e-6, 0.1, "none")
    ),
    Choice(
        "lamb",
        dict(lr=1e-2, **BETAS, weight_decay=0.0, variant="google"),
        lamb(1e-2, 0.9, 0.95, 1e-6, 0.0, "none", adapt=False),
    ),
    Choice(
        "lamb", dict(lr=1e-2, **BETAS, weight_decay=0.1, variant="apex"), lamb(1e-2, 0.9, 0.95, 1e-6, 0.1, "moments")
    ),
    Choice(
        "lamb",
        dict(lr=1e-2, **BETAS, weight_decay=0.0, variant="apex"),
        lamb(1e-2, 0.9, 0.95, 1e-6, 0.0, "moments", adapt=False),
    ),
    Choice(
        "lamb",
        dict(lr=1e-2, **BETAS, weight_decay=0.0, variant="apex", adapt=True),
        lamb(1e-2, 0.9, 0.95, 1e-6, 0.0, "moments"),
    ),
    Choice(
        "lamb",
        dict(lr=1e-2, **BETAS, weight_decay=0.1, variant="deepspeed"),
        lamb(1e-2, 0.9, 0.95, 1e-6, 0.1, "step", ratio=(0.01, 10.0)),
    ),
    Choice(
        "lamb",
        dict(lr=1e-2, **BETAS, variant="deepspeed", bounds=(0.5, 0.6)),
        lamb(1e-2, 0.9, 0.95, 1e-6, 0.01, "step", ratio=(0.5, 0.6)),
    ),
    Choice("adafactor", T5, adafactor(LARGEST)),
    Choice("adafactor", dict(T5, beta1=0.9), adafactor(LARGEST, b1=0.9), shapes=((7, 5), (4, 3), (6, 4, 9), (8,))),
    Choice("adafactor", dict(T5, warmup_init=True), adafactor(LARGEST, rho=lambda t: min(1e-6 * t, 1 / math.sqrt(t)))),
    Choice("adafactor", dict(T5, scale_parameter=False), adafactor(LARGEST, scale=0.05)),
    Choice("adafactor", dict(T5, scale_parameter=False, lr=0.02), adafactor(LARGEST, rho=lambda t: 0.02, scale=1.0)),
    Choice(
        "adafactor",
        dict(T5, decay_offset=5, clip_threshold=0.5, decay_rate=-0.6),
        adafactor(LARGEST, offset=5, clip=0.5, exponent=0.6),
    ),
    Choice("adafactor", HF, adafactor()),
    Choice("adafactor", dict(HF, warmup_init=True), adafactor(rho=lambda t: min(1e-6 * t, 1 / math.sqrt(t)))),
    Choice(
        "adafactor", dict(HF, lr=0.01, weight_decay=0.1), adafactor(rho=lambda t: 0.01, decay=lambda alpha: 0.1 * alpha)
    ),
    Choice(
        "adafactor",
        dict(HF, lr=0.01, beta1=0.9, scale_parameter=False),
        adafactor(rho=lambda t: 0.01, scale=1.0, b1=0.9),
    ),
    Choice(
        "adafactor",
        dict(variant="torch", lr=0.3, weight_decay=0.1),
        adafactor(rho=lambda t: min(0.3, 1 / math.sqrt(t)), added=0.0, bound=2.0**-23, decay=lambda alpha: 0.03),
    ),
    Choice("adafactor", dict(variant="torch"), adafactor(added=0.0, bound=2.0**-23), scale=1e-7),
    Choice("adafactor", dict(variant="torch", eps=(1e-2, 1e-3)), adafactor(added=0.0, bound=1e-2), scale=1e-2),
]
# One choice for each optimizer, and for each path through its code: for suites that multiply choices by much else.
KINDS = [
    c for c in CHOICES if c.options.get("beta1") or c.options.get("nesterov") or c.options.get("variant") == "bert"
]
KINDS += list({c.optimizer: c for c in CHOICES}.values())
