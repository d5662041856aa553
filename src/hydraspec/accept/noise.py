"""Exponential noise that is a pure function of (seed, sequence, position, token).

The hash is our own, in integer arithmetic, so that the noise does not depend on the device, on the version of torch or
on what else is in the batch, and can be had for any subset of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The increment and the two multipliers of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
# generators, OOPSLA 2014; the multipliers are Stafford's variant 13).
_INCREMENT = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix_key(seed: int, sequence: int, position: int) -> int:
    """The key of one position's noise.

    Args:
        seed: of the request; any integer, taken modulo 2^64.
        sequence: tells samples of one prompt with one seed apart.
        position: index in the text (prompt and output) of the token that is chosen.

    Returns:
        64 mixed bits as a signed integer, what an int64 tensor holds.
    """
    return extend_key(extend_key(extend_key(0, seed), sequence), position)


def extend_key(key: int, value: int) -> int:
    """Mix one more integer into a key: splitmix64's output function of `key + increment + value` modulo 2^64."""
    bits = (key + _INCREMENT + value) & _MASK
    bits = ((bits ^ (bits >> 30)) * _FIRST_MULTIPLIER) & _MASK
    bits = ((bits ^ (bits >> 27)) * _SECOND_MULTIPLIER) & _MASK
    return _to_signed(bits ^ (bits >> 31))


def exponential_noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Independent standard exponential noise E for each key and token; -log(E) is Gumbel noise.

    The argmax of p / E is a sample of p: the exponential race, which is the Gumbel-max trick without its logarithm. The
    noise is -log1p(-u), where u = (bits + 0.5) / 2^32 and `bits` are the upper 32 of splitmix64's output number `token`
    from the state `key`. Small E, which win, keep their full resolution: they are read off at the side of 0.

    Args:
        keys: `[B]` int64, of `mix_key`.
        tokens: `[B, C]` or `[1, C]` int64 token ids.

    Returns:
        `[B, C]` float32, between 2^-33 and 16.7. The bits are the same on every device; the logarithm may differ there
        in the last place.
    """
    bits = (tokens * _to_signed(_INCREMENT)) + keys[:, None]  # int64 wraps around, as unsigned integers do
    # torch shifts arithmetically: the mask clears what the sign has filled.
    bits ^= (bits >> 30).bitwise_and_(_MASK >> 30)
    bits *= _to_signed(_FIRST_MULTIPLIER)
    bits ^= (bits >> 27).bitwise_and_(_MASK >> 27)
    bits *= _to_signed(_SECOND_MULTIPLIER)
    # The output function's last xor-shift changes no bit above the 33rd, and is left out.
    upper = bits.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF)
    minus_u = upper.to(torch.float32).add_(0.5).mul_(-(2.0**-32))
    minus_u.clamp_(min=2.0**-24 - 1.0)  # the largest bits round to 1, whose noise would be infinite
    return minus_u.log1p_().neg_()


def _to_signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
