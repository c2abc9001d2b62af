"""Optimizers with unscaling, global-norm clipping, the overflow skip and the update in one trip over memory.

    SGD   Adam   AdamW   LAMB   Adafactor          in the place of torch's, apex's, Hugging Face's; OPTIMIZERS has them
    decay_groups   layer_groups                    which tensors decay, and lower layers that learn more slowly
    memory_table                                   bytes of parameters, gradients, masters and states for every choice

    sgd.py  adam.py  lamb.py  adafactor.py         what each one's options mean; adafactor_variants.py: the Adafactors
    base.py  states.py  checks.py                  the step around an op; what is kept for a parameter; what is refused
    loading.py  namesakes.py                       state dicts, of ours and of those we stand in for
    groups.py  memory.py  sharding.py              parameter groups; bytes; DTensors of FSDP2 and tensor parallelism

Each is a `torch.optim.Optimizer` that takes its namesake's arguments and state dict, and a few more: `max_grad_norm`
(base.py), and `master`, `state_dtype` for parameters of 16 bits. To add one: an op in fastlm/ops, and a file here that
says what state a parameter has and which op to call.
"""

from fastlm.optim.adafactor import Adafactor
from fastlm.optim.adam import Adam, AdamW
from fastlm.optim.base import OPTIMIZERS, Optimizer
from fastlm.optim.groups import decay_groups, layer_groups
from fastlm.optim.lamb import LAMB
from fastlm.optim.memory import memory_table
from fastlm.optim.sgd import SGD

__all__ = [
    "LAMB",
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "Optimizer",
    "decay_groups",
    "layer_groups",
    "memory_table",
]
