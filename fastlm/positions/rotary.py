"""Rotary embedding: queries and keys turn by angles, so that their products see distances. Scalings: frequencies.py."""

from torch import Tensor

from fastlm.checks import each, finite, number, one_of, whole
from fastlm.ops.rotary import LAYOUTS
from fastlm.positions import frequencies
from fastlm.positions.base import Position, constants_device
from fastlm.positions.frequencies import Scaling


class RoPE(Position, name="rope"):
    """Rotary embedding (Su et al. 2021): queries and keys turn by angles position · base^(-2i/R).

    The score of a query and a key then depends on the difference of their positions alone.

    Args:
        head_dim: channels of a head, D. Attention refuses heads of another size.
        base: of the frequencies; > 1. Default 10000.
        layout: "half" pairs channel i with i + R/2 (NeoX, Llama), "interleaved" pairs 2i with 2i + 1 (the paper,
            GPT-J). "proportional" (Gemma) pairs i with i + D/2 and takes the frequencies of the whole head, R = D, of
            which the first `fraction` turn and the others stand still.
        fraction: share of the channels that turn, in (0, 1]; below 1 it is partial rotary, R = fraction · D, rounded
            down.
        scaling: one of fastlm/positions/frequencies.py, for contexts longer than those trained. Default unscaled.

    Raises:
        ValueError: for a base ≤ 1, a fraction outside (0, 1], an unknown layout, a scaling that cannot be called or
            returns another number of frequencies, and where the channels that turn are zero or odd.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        layout: str = "half",
        fraction: float = 1.0,
        scaling: Scaling = frequencies.unscaled,
    ):
        super().__init__()
        whole(1, head_dim=head_dim)
        each(dict(base=base), lambda x: finite(x) and x > 1, "give a number > 1, such as 10000.0")
        each(
            dict(fraction=fraction),
            lambda x: number(x) and 0 < x <= 1,
            "give the share of channels that turn, in (0, 1]",
        )
        one_of((*LAYOUTS, "proportional"), layout=layout)
        each(dict(scaling=scaling), callable, "give a function such as fastlm.positions.frequencies.yarn(8.0, 4096)")
        rotated = int(head_dim * fraction)
        if rotated % 2 or rotated == 0:
            raise ValueError(
                f"RoPE turns pairs of channels: head_dim {head_dim} × fraction {fraction} must be even and positive"
            )
        proportional = layout == "proportional"
        self.head_dim = head_dim
        self.layout = "half" if proportional else layout
        with constants_device():
            channels = head_dim if proportional else rotated
            pitch, self.magnitude = scaling(base, channels)
        if pitch.shape != (channels // 2,):
            raise ValueError(
                f"scaling gave frequencies of shape {list(pitch.shape)} for {channels} channels, which turn in pairs; "
                f"return [{channels // 2}]"
            )
        if proportional:
            pitch[rotated // 2 :] = 0
        self.register_buffer("pitch", pitch, persistent=False)

    def angles(self, positions: Tensor) -> Tensor:
        """positions [L] fp64 → position · frequency, [L, R/2] fp64 in radians."""
        return positions[:, None] * self.pitch.to(positions.device)  # a meta model's is not there
