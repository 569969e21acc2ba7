"""Noise on what a router sees, the same for a token under every layout."""

import torch
from torch import Tensor

# The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), signed.
_STEP = -7046029254386353131
_ROUNDS = ((30, -4658895280553007687), (27, -7723592293110705685))


def jittered(x_TD: Tensor, width: float, number_T: Tensor, layer: int) -> Tensor:
    """`x` times noise uniform in `1 - width` to `1 + width`, one an element (Switch, arXiv:2101.03961, appendix C).

    The noise is a hash of the token's number in the run, the layer and the channel: no generator whose state would
    depend on which rank draws what.
    """
    channel_D = torch.arange(x_TD.shape[1], device=x_TD.device)
    bits_TD = _mixed(_mixed(_mixed(number_T) + layer)[:, None] + channel_D * _STEP)
    uniform_TD = (bits_TD & 0xFFFFFF).to(x_TD.dtype) / 0x1000000
    return x_TD * (1 - width + 2 * width * uniform_TD)


def _mixed(bits: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        bits = (bits ^ _shifted(bits, shift)) * factor
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)  # int64 shifts copy the sign
