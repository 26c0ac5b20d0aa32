"""Counter-based noise: known answers, layout invariance to the bit, distribution."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_bitlm.method.noise import Stream, _normal_from_words, normal, philox4x32, uniform

# Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Independent reference in unbounded Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def _scalar_words(seed: int, stream: Stream, sample: int, block: int, num: int) -> list[int]:
    words: list[int] = []
    for quad in range(-(-num // 4)):
        words += _scalar_philox([quad, block, sample % 2**32, sample >> 32], [seed, int(stream)])
    return words[: num + num % 2]


def _scalar_normals(words: list[int]) -> list[float]:
    """Textbook Box-Muller in double precision, with the documented reading of the two words."""
    numbers = []
    for radius_word, angle_word in zip(words[0::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(float(np.float32(radius_word + 1)) / 2**32))
        half_turn, low = divmod(angle_word, 2**31)
        centred = low if low < 2**30 else low - 2**31
        angle = math.pi * (centred / 2**31 + half_turn)
        numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    return numbers


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_random123_known_answers(counter, key, expected):
    assert _scalar_philox(_words(counter), _words(key)) == _words(expected)
    key0, key1 = _words(key)
    found = philox4x32([torch.tensor([word]) for word in _words(counter)], (key0, key1))
    assert [int(word) for word in found] == _words(expected)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(list(Stream)),
    st.integers(0, 2**62),
    st.integers(0, 2**32 - 1),
    st.integers(0, 21),
)
def test_equals_scalar_reference(seed, stream, sample, block, num):
    words = _scalar_words(seed, stream, sample, block, num)
    found = uniform(seed, stream, torch.tensor(sample), torch.tensor(block), num)
    assert found.dtype == torch.float32 and found.tolist() == [(w >> 8) / 2**24 for w in words[:num]]
    numbers = normal(seed, stream, torch.tensor(sample), torch.tensor(block), num)
    np.testing.assert_allclose(numbers.numpy(), _scalar_normals(words)[:num], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("num", [1, 37, 72])
def test_any_slicing_gives_the_same_bits(draw, num):
    """Odd sizes put numbers in vector bodies and tails alike; library log and cos would differ there."""
    sample = torch.arange(13)[:, None] * 1_000_000_007_000
    block = torch.arange(129)[None]
    whole = draw(7, Stream.GAUSSIAN, sample, block, num)
    assert whole.shape == (13, 129, num)
    generator = torch.Generator().manual_seed(num)
    for _ in range(20):
        rows = torch.randperm(13, generator=generator)[: int(torch.randint(1, 13, (), generator=generator))]
        first = int(torch.randint(0, 129, (), generator=generator))
        last = int(torch.randint(first + 1, 130, (), generator=generator))
        part = draw(7, Stream.GAUSSIAN, sample[rows], block[:, first:last], num)
        assert torch.equal(part, whole[rows, first:last])
    single = draw(7, Stream.GAUSSIAN, sample[5, 0], block[0, 77], num)
    assert torch.equal(single, whole[5, 77])
    flat_sample, flat_block = torch.broadcast_tensors(sample, block)
    order = torch.randperm(13 * 129, generator=generator)
    shuffled = draw(7, Stream.GAUSSIAN, flat_sample.flatten()[order], flat_block.flatten()[order].int(), num)
    assert torch.equal(shuffled, whole.flatten(0, 1)[order])
    assert torch.equal(draw(7, Stream.GAUSSIAN, sample, block, num + 9)[..., :num], whole)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_do_not_change_the_bits(num_threads):
    block = torch.arange(20_001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        found = normal(1, Stream.GAUSSIAN, torch.tensor(3), block, 10)
    finally:
        torch.set_num_threads(before)
    few = slice(17_000, 17_003)
    assert torch.equal(found[few], normal(1, Stream.GAUSSIAN, torch.tensor(3), block[few], 10))


def test_numbers_never_change():
    """Only exactly rounded operations are used, so these digests hold on every machine."""
    sample, block = torch.arange(50)[:, None], torch.arange(20)[None]
    digests = []
    for draw, stream in ((uniform, Stream.TIME), (normal, Stream.GAUSSIAN)):
        numbers = draw(2**31 + 5, stream, sample, block, 11).numpy().astype("<f4")
        digests.append(hashlib.sha256(numbers.tobytes()).hexdigest()[:16])
    assert digests == ["dc53588ff6fec4f6", "2ad20843f6b9d43d"]


def test_stream_values_are_fixed():
    names = ("TIME", "GAUSSIAN", "CONDITION_DROP", "BIT_FLIP", "SAMPLER", "LIKELIHOOD_TIME", "LIKELIHOOD_NOISE")
    assert {stream.name: stream.value for stream in Stream} == {
        name: value for value, name in enumerate((*names, "TOKEN_SAMPLER"))
    }


def test_distribution():
    sample, block = torch.arange(100)[:, None], torch.arange(250)[None]
    uniforms = uniform(11, Stream.TIME, sample, block, 40).double().flatten().numpy()
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert stats.kstest(uniforms, "uniform").pvalue > 1e-3
    normals = normal(11, Stream.GAUSSIAN, sample, block, 40).double().flatten().numpy()
    assert stats.kstest(normals, "norm").pvalue > 1e-3
    assert stats.kstest(np.abs(normals[0::2] + 1j * normals[1::2]), stats.rayleigh.cdf).pvalue > 1e-3
    count = normals.size  # 1e6; standard errors of the moments are sqrt(1, 2, 15, 96) / sqrt(count)
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((normals**power).mean() - moment) < 4 * math.sqrt(variance / count)


def test_streams_samples_blocks_and_draws_are_uncorrelated():
    sample, block = torch.arange(40)[:, None], torch.arange(50)[None]
    first = normal(0, Stream.GAUSSIAN, sample, block, 6)
    variants = [
        normal(0, Stream.SAMPLER, sample, block, 6),
        normal(1, Stream.GAUSSIAN, sample, block, 6),
        normal(0, Stream.GAUSSIAN, sample + 40, block, 6),
        normal(0, Stream.GAUSSIAN, sample + 2**32, block, 6),
        normal(0, Stream.GAUSSIAN, sample, block + 50, 6),
        first.roll(1, -1),
    ]
    for other in variants:
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 4 / 12_000**0.5


def test_extreme_words_stay_finite():
    """Every radius word at the ends of the range, through the same transform."""
    edges = torch.tensor([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 2, 2**32 - 1])
    pairs = torch.cartesian_prod(edges, edges)
    numbers = _normal_from_words([pairs[:, 0], pairs[:, 1], pairs[:, 1], pairs[:, 0]])
    assert torch.isfinite(numbers).all() and numbers.abs().max() < 6.67
    expected = [_scalar_normals([a, b, b, a]) for a, b in pairs.tolist()]
    np.testing.assert_allclose(numbers.numpy(), expected, rtol=1e-6, atol=2e-6)


def test_shapes_and_bad_input():
    zero = torch.tensor(0)
    assert uniform(0, Stream.TIME, zero, zero, 0).shape == (0,)
    assert normal(0, Stream.TIME, torch.empty(0, dtype=torch.int64), zero, 5).shape == (0, 5)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed"):
            uniform(seed, Stream.TIME, zero, zero, 1)
    with pytest.raises(ValueError, match="num"):
        normal(0, Stream.TIME, zero, zero, -1)
    with pytest.raises(ValueError, match="block indices must be integers"):
        normal(0, Stream.TIME, zero, torch.tensor(0.5), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_bits_of_the_cpu():
    sample, block = torch.arange(33)[:, None], torch.arange(101)[None]
    for draw in (uniform, normal):
        on_device = draw(5, Stream.GAUSSIAN, sample.cuda(), block.cuda(), 71)
        assert torch.equal(on_device.cpu(), draw(5, Stream.GAUSSIAN, sample, block, 71))
