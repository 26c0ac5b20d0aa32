"""Binary codes against brute force and plain-Python bit strings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bitlm.method.codes import BinaryCode, packed_num_bytes

VOCAB_SIZES = [2, 3, 1000, 151_669]


def _permutation(vocab_size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(vocab_size)


def _brute_force_nearest(code: BinaryCode, analog: torch.Tensor) -> torch.Tensor:
    """Argmax over every id; equal scores go to the id of the largest pattern."""
    bits = [[int(c) for c in format(pattern, f"0{code.num_bits}b")] for pattern in range(code.vocab_size)]
    table = 2 * torch.tensor(bits, dtype=torch.float64) - 1
    scores = analog.double() @ table.T
    reversed_best = scores.flip(-1).argmax(-1)
    patterns = code.vocab_size - 1 - reversed_best
    if code.code_map is None:
        return patterns
    return torch.tensor(np.argsort(code.code_map))[patterns]


def _bit_string_bytes(patterns: list[int], num_bits: int) -> bytes:
    stream = "".join(format(p, f"0{num_bits}b") for p in patterns)
    stream += "0" * (-len(stream) % 8)
    return bytes(int(stream[i : i + 8], 2) for i in range(0, len(stream), 8))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_round_trip_of_every_id(vocab_size, mapped):
    code = BinaryCode(vocab_size, _permutation(vocab_size) if mapped else None)
    assert code.num_bits == math.ceil(math.log2(vocab_size))
    ids = torch.arange(vocab_size)
    codes = code.encode(ids)
    assert codes.shape == (vocab_size, code.num_bits) and codes.dtype == torch.float32
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert torch.unique(codes, dim=0).shape[0] == vocab_size
    assert code.is_valid(codes).all()
    assert torch.equal(code.decode(0.3 * codes), ids)
    packed = code.pack(ids)
    assert packed.numel() == packed_num_bytes(vocab_size, code.num_bits)
    assert torch.equal(code.unpack(packed, vocab_size), ids)
    assert torch.equal(code.unpack_codes(packed, vocab_size), codes)


def test_encode_is_most_significant_bit_first():
    assert BinaryCode(151_669).encode(torch.tensor(5)).tolist() == [-1.0] * 15 + [1.0, -1.0, 1.0]
    reversed_ids = BinaryCode(4, np.array([3, 2, 1, 0]))
    assert reversed_ids.encode(torch.tensor([[0, 2]])).tolist() == [[[1, 1], [-1, 1]]]
    assert BinaryCode(4).encode(torch.tensor([1]), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("vocab_size", [2, 3, 5, 11, 513, 1000, 1024, 1025])
def test_nearest_valid_id_equals_brute_force(vocab_size, mapped):
    generator = torch.Generator().manual_seed(vocab_size)
    code = BinaryCode(vocab_size, _permutation(vocab_size) if mapped else None)
    analog = torch.randn(2000, code.num_bits, generator=generator)
    # Small integers: zeros and exact ties.
    small_integers = torch.randint(-2, 3, (2000, code.num_bits), generator=generator).float()
    mostly_ones = torch.randn(2000, code.num_bits, generator=generator) + 1.0
    for sample in (analog, small_integers, mostly_ones, torch.zeros(1, code.num_bits)):
        assert torch.equal(code.decode(sample), _brute_force_nearest(code, sample))


@given(st.integers(2, 70), st.data())
def test_nearest_valid_id_with_ties(vocab_size, data):
    code = BinaryCode(vocab_size)
    values = data.draw(st.lists(st.integers(-3, 3), min_size=code.num_bits, max_size=code.num_bits))
    analog = torch.tensor(values, dtype=torch.float32)
    assert code.decode(analog) == _brute_force_nearest(code, analog[None])[0]


def test_is_valid_and_zero_counts_as_plus_one():
    code = BinaryCode(5)  # patterns 5, 6, 7 belong to no id
    table = 2.0 * torch.tensor([[int(c) for c in format(p, "03b")] for p in range(8)]) - 1
    assert code.is_valid(table).tolist() == [True] * 5 + [False] * 3
    assert BinaryCode(2).decode(torch.zeros(1)) == 1
    assert not code.is_valid(torch.zeros(3))


def test_decode_shapes_dtypes_and_infinities():
    code = BinaryCode(11)
    analog = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = code.decode(analog)
    assert expected.shape == (2, 3, 4) and expected.dtype == torch.int64
    assert torch.equal(code.decode(analog.double()), expected)
    assert torch.equal(code.decode(analog.transpose(0, 2)), expected.transpose(0, 2))
    assert code.decode(torch.empty(0, 4)).shape == (0,)
    assert code.decode(torch.tensor([torch.inf, torch.inf, -torch.inf, -1.0])) < 11
    before = analog.clone()
    code.decode(analog)
    assert torch.equal(analog, before)


def test_packed_size_of_the_paper_vocabulary():
    code = BinaryCode(151_669)
    block = code.pack(torch.arange(4))
    assert code.num_bits == 18 and block.numel() / 4 == 2.25
    assert packed_num_bytes(0, 18) == 0 and packed_num_bytes(1, 18) == 3 and packed_num_bytes(5, 1) == 1


@settings(max_examples=60)
@given(st.integers(2, 200_000), st.integers(0, 9), st.booleans(), st.data())
def test_numpy_torch_and_bit_strings_agree(vocab_size, num_tokens, mapped, data):
    code = BinaryCode(vocab_size, _permutation(vocab_size) if mapped else None)
    id_lists = st.lists(st.integers(0, vocab_size - 1), min_size=num_tokens, max_size=num_tokens)
    ids = np.array([data.draw(id_lists), data.draw(id_lists)], dtype=np.int64).reshape(2, num_tokens)
    packed = code.pack(ids)
    assert isinstance(packed, np.ndarray) and packed.dtype == np.uint8
    patterns = ids if code.code_map is None else code.code_map[ids]
    for row, row_patterns in zip(packed, patterns.tolist(), strict=True):
        assert row.tobytes() == _bit_string_bytes(row_patterns, code.num_bits)
    packed_torch = code.pack(torch.from_numpy(ids))
    assert packed_torch.dtype == torch.uint8 and np.array_equal(packed_torch.numpy(), packed)
    assert np.array_equal(code.unpack(packed, num_tokens), ids)
    assert np.array_equal(code.unpack(packed_torch, num_tokens).numpy(), ids)
    codes = code.unpack_codes(packed_torch, num_tokens)
    assert torch.equal(codes, code.encode(torch.from_numpy(ids)))
    assert np.array_equal(code.unpack_codes(packed, num_tokens), codes.numpy())


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_pack_takes_any_integer_dtype(dtype):
    ids = np.array([[0, 1, 999]], dtype=dtype)
    assert np.array_equal(BinaryCode(1000).unpack(BinaryCode(1000).pack(ids), 3), ids)


def test_code_map_hash():
    permutation = _permutation(1000)
    assert BinaryCode(1000).code_map_hash == "identity"
    identity = BinaryCode(1000, np.arange(1000))
    assert identity.code_map_hash == "identity" and identity.code_map is None
    mapped = BinaryCode(1000, permutation)
    assert len(mapped.code_map_hash) == 64
    assert mapped.code_map_hash == BinaryCode(1000, torch.from_numpy(permutation).int()).code_map_hash
    assert mapped.code_map_hash != BinaryCode(1000, _permutation(1000, seed=1)).code_map_hash
    assert mapped.code_map.dtype == np.int64


def test_bad_input_is_refused():
    code = BinaryCode(1000)
    with pytest.raises(ValueError, match="vocab_size"):
        BinaryCode(1)
    with pytest.raises(ValueError, match="1000"):
        code.encode(torch.tensor([3, 1000]))
    with pytest.raises(ValueError, match="-7"):
        code.pack(np.array([3, -7]))
    with pytest.raises(ValueError, match="integers"):
        code.encode(torch.tensor([3.0]))
    with pytest.raises(ValueError, match="NaN"):
        code.decode(torch.full((2, 10), torch.nan))
    with pytest.raises(ValueError, match="last axis of 10"):
        code.decode(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="permutation"):
        BinaryCode(3, np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="3 integers"):
        BinaryCode(3, np.array([0, 1]))
    with pytest.raises(ValueError, match="uint8"):
        code.unpack(torch.zeros(5), 4)
    with pytest.raises(ValueError, match="5 bytes"):
        code.unpack(torch.zeros(4, dtype=torch.uint8), 4)
    foreign = np.full(5, 255, dtype=np.uint8)
    with pytest.raises(ValueError, match="pattern 1023"):
        code.unpack(foreign, 4)
    with pytest.raises(ValueError, match="pattern 1023"):
        code.unpack(torch.from_numpy(foreign), 4)
