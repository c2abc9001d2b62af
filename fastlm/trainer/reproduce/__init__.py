"""Tables and figures of the field's papers at a size that a laptop trains in minutes: `fastlm reproduce NAME`.

    experiment.py       Experiment, what one defines; EXPERIMENTS, name → class; Setting, Finding, Claim
    learning.py         small models that learn; means with their spread
    report.py           a figure each, and one report.md of all

    warmup.py           how a norm after the sum needs a climb (Popel & Bojar 2018; Huang et al. 2020)
    optimizers.py       SGD beside the Adam family
    adafactor.py        Adafactor's memory and loss beside Adam's (Shazeer & Stern 2018)
    loss_scaling.py     gradients that fp16 cannot hold (Micikevicius et al. 2018)
    accumulation.py     micro-batches that make one large batch, and those that do not
    masking.py          static and dynamic masking (Liu et al. 2019, table 1)
    albert_sizes.py     parameters of ALBERT and BERT (Lan et al. 2020, table 1)
    rope_decay.py       how rotary scores may fall with distance (Su et al. 2021, fig. 2)
    extrapolation.py    rows longer than those trained on (Press et al. 2022; Chen et al. 2023)

In goes a Setting: a text, seeds, and how much work to spend; out comes a Finding: a table, a figure, and claims, each
of which holds at this size or does not. To add one, subclass `Experiment` with a name in a file here.
"""

from fastlm.trainer.reproduce.accumulation import Accumulation
from fastlm.trainer.reproduce.adafactor import AdafactorsMemory
from fastlm.trainer.reproduce.albert_sizes import AlbertSizes
from fastlm.trainer.reproduce.experiment import EXPERIMENTS, Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.extrapolation import Extrapolation
from fastlm.trainer.reproduce.loss_scaling import LossScaling
from fastlm.trainer.reproduce.masking import StaticAndDynamic
from fastlm.trainer.reproduce.optimizers import Optimizers
from fastlm.trainer.reproduce.rope_decay import RotaryDecay
from fastlm.trainer.reproduce.warmup import Warmup

__all__ = [
    "EXPERIMENTS", "Accumulation", "AdafactorsMemory", "AlbertSizes", "Claim", "Experiment", "Extrapolation", "Finding",
    "LossScaling", "Optimizers", "RotaryDecay", "Setting", "StaticAndDynamic", "Warmup",
]  # fmt: skip
