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
    batch_size.py       updates to a loss by the size of a batch (McCandlish et al. 2018; Shallue et al. 2019)
    memory_length.py    Transformer-XL's memory, shorter and longer (Dai et al. 2019)
    next_sentence.py    pairs of texts with and without their label (Liu et al. 2019, table 2)
    bart_noises.py      BART's noises, each by itself (Lewis et al. 2020, table 1)
    detection.py        replaced tokens beside hidden ones, for as much work (Clark et al. 2020, fig. 1)
    clean_text.py       clean text, noisy text, and what rules make of that (Raffel et al. 2020, table 8)

In goes a Setting: a text, seeds, and how much work to spend; out comes a Finding: a table, a figure, and claims, each
of which holds at this size or does not. To add one, subclass `Experiment` with a name in a file here.
"""

from fastlm.trainer.reproduce.accumulation import Accumulation
from fastlm.trainer.reproduce.adafactor import AdafactorsMemory
from fastlm.trainer.reproduce.albert_sizes import AlbertSizes
from fastlm.trainer.reproduce.bart_noises import BartNoises
from fastlm.trainer.reproduce.batch_size import BatchSize
from fastlm.trainer.reproduce.clean_text import CleanText
from fastlm.trainer.reproduce.detection import Detection
from fastlm.trainer.reproduce.experiment import EXPERIMENTS, Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.extrapolation import Extrapolation
from fastlm.trainer.reproduce.loss_scaling import LossScaling
from fastlm.trainer.reproduce.masking import StaticAndDynamic
from fastlm.trainer.reproduce.memory_length import MemoryLength
from fastlm.trainer.reproduce.next_sentence import WithoutNextSentence
from fastlm.trainer.reproduce.optimizers import Optimizers
from fastlm.trainer.reproduce.rope_decay import RotaryDecay
from fastlm.trainer.reproduce.warmup import Warmup

__all__ = [
    "EXPERIMENTS", "Accumulation", "AdafactorsMemory", "AlbertSizes", "BartNoises", "BatchSize", "Claim", "CleanText",
    "Detection", "Experiment", "Extrapolation", "Finding", "LossScaling", "MemoryLength", "Optimizers", "RotaryDecay",
    "Setting", "StaticAndDynamic", "Warmup", "WithoutNextSentence",
]  # fmt: skip
