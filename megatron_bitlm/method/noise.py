"""Layout-invariant randomness: numbers that depend on (seed, stream, sample, block, draw) and nothing else.

Diffusion times, Gaussian noise, condition drops and bit flips of a block must not change with the rank,
microbatch, device or tensor shape they are computed in; then every parallel layout trains the same curve.
So they come from a counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", 2011), evaluated with int64 tensor operations. Library log, sin and cos are not bit-for-bit the
same on every device, nor even in the body and the tail of one buffer, so the Box-Muller transform here uses
only operations that IEEE 754 rounds exactly (+, -, *, /, sqrt). For the same reason call these functions
outside torch.compile, which may contract a product and a sum into one rounding.

Draw d of a block is word d % 4 of the Philox output for counter (d // 4, block, low and high half of sample)
and key (seed, stream); asking for more draws never changes the earlier ones.

Legend: R rows = broadcast(sample, block) flattened, Q quads of draws, W the four words of a quad.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_WEYL = (0x9E37_79B9, 0xBB67_AE85)
_NUM_ROUNDS = 10

# ln m = s * (2 + s^2 * P(s^2)), s = (m-1)/(m+1), sqrt(1/2) <= m < sqrt(2); P interpolates at Chebyshev nodes,
# relative error 2e-8.
_LOG_POLYNOMIAL = (0.66666685, 0.39988779, 0.29579984)
_SQRT_HALF_BITS = 0x3F35_04F3
# sin x = x * (1 + x^2 * P(x^2)), |x| <= pi/4; relative error 3e-9.
_SIN_POLYNOMIAL = (-0.16666665, 0.00833275, -0.00019588)


class Stream(IntEnum):
    """What the numbers are for; part of the Philox key. Changing a value changes every run."""

    TIME = 0
    GAUSSIAN = 1
    CONDITION_DROP = 2
    BIT_FLIP = 3
    SAMPLER = 4
    LIKELIHOOD_TIME = 5
    LIKELIHOOD_NOISE = 6
    TOKEN_SAMPLER = 7


def uniform(seed: int, stream: Stream, sample: Tensor, block: Tensor, num: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24.

    Args:
        seed: 0 <= seed < 2^32.
        stream: purpose of the numbers.
        sample: integer sample indices; any shape that broadcasts with ``block``.
        block: integer block indices within the sample, 0 <= block < 2^32.
        num: draws per (sample, block).

    Returns:
        float32 [*broadcast(sample, block), num] on the device of ``sample``.

    Raises:
        ValueError: seed outside [0, 2^32), negative ``num``, or indices that are not integers.
    """
    return _draw(_uniform_from_words, seed, stream, sample, block, num)


def normal(seed: int, stream: Stream, sample: Tensor, block: Tensor, num: int) -> Tensor:
    """Standard normal numbers (Box-Muller); |value| <= 6.67, never infinite or NaN.

    Draws 2i and 2i+1 are r*cos(a) and r*sin(a), with r and a from words 2i and 2i+1. Arguments, shape, dtype
    and errors are those of ``uniform``.
    """
    return _draw(_normal_from_words, seed, stream, sample, block, num)


def _draw(
    transform: Callable[[list[Tensor]], Tensor],
    seed: int,
    stream: Stream,
    sample: Tensor,
    block: Tensor,
    num: int,
) -> Tensor:
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}")
    if num < 0:
        raise ValueError(f"num must not be negative, got {num}")
    for name, index in (("sample", sample), ("block", block)):
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise ValueError(f"{name} indices must be integers, got {index.dtype}")
    sample, block = torch.broadcast_tensors(sample.long(), block.long())
    sample_r1, block_r1 = sample.reshape(-1, 1), block.reshape(-1, 1)
    quad_q = torch.arange(-(-num // 4), device=sample.device)
    counter = [quad_q, block_r1 & _MASK, sample_r1 & _MASK, (sample_r1 >> 32) & _MASK]
    numbers_rqw = transform(philox4x32(counter, (seed, int(stream))))
    return numbers_rqw.flatten(-2)[:, :num].reshape(*sample.shape, num)


def philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10, the bijection of Random123.

    Args:
        counter: four int64 tensors of 32-bit words that broadcast together.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of the broadcast shape, words < 2^32.
    """
    # The 64-bit products wrap as two's complement, so the high word is a shift and a mask away. Low words are
    # masked with the high word they are combined with, or at the end.
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_NUM_ROUNDS):
        product0, product2 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0 = (product2 >> 32).bitwise_xor(word1).bitwise_xor_(key0).bitwise_and_(_MASK)
        word2 = (product0 >> 32).bitwise_xor(word3).bitwise_xor_(key1).bitwise_and_(_MASK)
        word1, word3 = product2, product0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return [word0, word1 & _MASK, word2, word3 & _MASK]


def _uniform_from_words(words: list[Tensor]) -> Tensor:
    """Four words [R, Q] -> float32 [R, Q, 4]."""
    return (torch.stack(words, -1) >> 8).to(torch.float32).mul_(2.0**-24)


def _normal_from_words(words: list[Tensor]) -> Tensor:
    """Four words [R, Q] -> float32 [R, Q, 4]."""
    radius = _radius(torch.stack(words[0::2], -1))
    angle_words = torch.stack(words[1::2], -1).to(torch.int32)  # keeps the 32 bits
    # The top bit turns the vector by half a turn: it is the sign of the radius. The other 31 bits are half
    # the angle, in [-pi/4, pi/4), where the series is short and 1 - sin^2 loses nothing.
    signed_radius = radius.view(torch.int32).bitwise_xor_(angle_words & -(2**31)).view(torch.float32)
    half_angle = (angle_words << 1).to(torch.float32).mul_(math.pi / 4 * 2.0**-31)
    sine = _polynomial(half_angle * half_angle, _SIN_POLYNOMIAL, 1.0).mul_(half_angle)
    sine_squared = sine * sine
    cosine = (1.0 - sine_squared).sqrt_()
    out = torch.empty(*radius.shape, 2, dtype=torch.float32, device=radius.device)
    torch.mul(sine_squared.mul_(-2.0).add_(1.0), signed_radius, out=out[..., 0])
    torch.mul(sine.mul_(cosine).mul_(2.0), signed_radius, out=out[..., 1])
    return out.flatten(-2)


def _radius(words: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (word + 1) / 2^32 rounded to float32, in (0, 1]: int64 -> float32, same shape."""
    bits = (words + 1).to(torch.float32).view(torch.int32).sub_(_SQRT_HALF_BITS)
    # word + 1 = 2^exponent * m with sqrt(1/2) <= m < sqrt(2).
    exponent = (bits >> 23).to(torch.float32).sub_(32.0)
    mantissa = bits.bitwise_and_(0x7F_FFFF).add_(_SQRT_HALF_BITS).view(torch.float32)
    ratio = (mantissa - 1.0).div_(mantissa.add_(1.0))
    minus_two_log = _polynomial(ratio * ratio, tuple(-2.0 * c for c in _LOG_POLYNOMIAL), -4.0).mul_(ratio)
    return minus_two_log.add_(exponent.mul_(-2.0 * math.log(2.0))).sqrt_()


def _polynomial(x: Tensor, coefficients: tuple[float, ...], constant: float) -> Tensor:
    """constant + x * (c0 + x * (c1 + x * c2)), each product and sum rounded on its own (nothing fused)."""
    result = x * coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        result.add_(coefficient).mul_(x)
    return result.add_(constant)
