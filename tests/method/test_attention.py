"""Block-causal attention against an explicit softmax over a mask built pair by pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bitlm.method.attention import (
    BlockCausalLayout,
    block_causal_attention,
    block_causal_mask,
    cached_block_attention,
    choose_backend,
)
from megatron_bitlm.method.attention_flash import flash_obstacle

CPU = torch.device("cpu")


def _reference_mask(batch_size: int, seq_len: int, block_size: int, cu_seqlens: list[int] | None) -> torch.Tensor:
    """Eq. 16 and documents, spelled out on the flattened batch: bool [B, S, S]."""
    offsets = cu_seqlens or [row * seq_len for row in range(batch_size + 1)]
    document = np.searchsorted(offsets, np.arange(batch_size * seq_len), side="right").reshape(batch_size, seq_len)
    block = np.arange(seq_len) // block_size
    sees = (document[:, :, None] == document[:, None, :]) & (block[None, None, :] <= block[None, :, None])
    return torch.from_numpy(sees)


def _reference(q, k, v, mask_bss, scale=None):
    num_shared = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(num_shared, 2), v.repeat_interleave(num_shared, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask_bss[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def _inputs(batch_size, seq_len, num_heads, num_kv_heads, head_dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch_size, seq_len, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    q, k, v, grad_out = (torch.randn(s, generator=generator, dtype=torch.float64).mul(1.3).to(dtype) for s in shapes)
    return q, k, v, grad_out


def _some_documents(batch_size, seq_len, block_size, seed=0, cuts=5) -> list[int]:
    """Offsets with every row start and a few cuts at block boundaries."""
    num_blocks = batch_size * seq_len // block_size
    found = np.random.default_rng(seed).integers(1, num_blocks, cuts * batch_size) * block_size
    return sorted({*found.tolist(), *range(0, batch_size * seq_len + 1, seq_len)})


def _values_and_grads(attend, q, k, v, grad_out):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out))


def _max_errors(q, k, v, grad_out, block_size, cu_seqlens, backend):
    mask = _reference_mask(*q.shape[:2], block_size, cu_seqlens)
    wide = [x.double() for x in (q, k, v, grad_out)]
    expected = _values_and_grads(lambda *qkv: _reference(*qkv, mask), *wide)
    found = _values_and_grads(
        lambda *qkv: block_causal_attention(
            *qkv, block_size=block_size, cu_seqlens=cu_seqlens, backend=backend
        ),
        q, k, v, grad_out,
    )  # fmt: skip
    assert [x.dtype for x in found] == [q.dtype] * 4
    return [(a.double() - b).abs().max().item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize(("seq_len", "head_dim", "batch_size"), [(64, 16, 3), (64, 64, 1), (64, 128, 3), (512, 64, 1)])
def test_flash_equals_reference_in_float64(seq_len, head_dim, batch_size, heads, block_size, documents):
    inputs = _inputs(batch_size, seq_len, *heads, head_dim)
    cu_seqlens = _some_documents(batch_size, seq_len, block_size) if documents else None
    assert max(_max_errors(*inputs, block_size, cu_seqlens, "flash")) <= 1e-12


@pytest.mark.parametrize(("head_dim", "heads", "block_size"), [(16, (8, 2), 4), (128, (4, 4), 8), (64, (8, 1), 2)])
def test_flash_equals_reference_on_a_long_packed_batch(head_dim, heads, block_size):
    inputs = _inputs(3, 512, *heads, head_dim)
    assert max(_max_errors(*inputs, block_size, _some_documents(3, 512, block_size, cuts=9), "flash")) <= 1e-12


@pytest.mark.parametrize("heads", [(16, 16), (16, 8)])
@pytest.mark.parametrize("documents", [False, True])
def test_many_key_heads_become_rows(heads, documents):
    cu_seqlens = _some_documents(3, 64, 8) if documents else None
    assert max(_max_errors(*_inputs(3, 64, *heads, 16), 8, cu_seqlens, "flash")) <= 1e-12


def test_repeated_rows_of_a_layout():
    layout = BlockCausalLayout.build(2, 8, 2, [0, 2, 8, 12, 16])
    repeated = layout.repeat_rows(2)
    assert repeated.cu_seqlens == (0, 2, 8, 10, 16, 20, 24, 28, 32) and repeated.batch_size == 4
    assert layout.repeat_rows(2) is repeated


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block_size", [1, 4])
def test_dense_equals_reference(block_size, documents):
    cu_seqlens = _some_documents(3, 64, block_size) if documents else None
    assert max(_max_errors(*_inputs(3, 64, 8, 2, 16), block_size, cu_seqlens, "dense")) <= 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.data())
def test_any_documents(block_size, batch_size, num_blocks, data):
    """Neighbouring and scattered documents of equal length, documents of one block, one document a row."""
    seq_len = block_size * num_blocks
    cuts = data.draw(st.sets(st.integers(0, batch_size * num_blocks - 1)))
    row_starts = set(range(0, batch_size * num_blocks + 1, num_blocks))
    cu_seqlens = [block * block_size for block in sorted(cuts | row_starts)]
    inputs = _inputs(batch_size, seq_len, 4, 2, 8, seed=num_blocks)
    assert max(_max_errors(*inputs, block_size, cu_seqlens, "flash")) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.25), (torch.float16, 0.02)])
@pytest.mark.parametrize("block_size", [4, 8])
def test_lower_precision_is_as_good_as_masked_attention(dtype, tolerance, block_size):
    inputs = _inputs(2, 256, 8, 2, 64, dtype)
    cu_seqlens = _some_documents(2, 256, block_size)
    flash = _max_errors(*inputs, block_size, cu_seqlens, "flash")
    dense = _max_errors(*inputs, block_size, cu_seqlens, "dense")
    for error, dense_error in zip(flash, dense, strict=True):
        assert error <= tolerance and error <= 4 * dense_error


def test_scores_are_not_rounded_to_half_precision():
    """Scores near 50: a bfloat16 one is off by up to 0.1, and its probability by as much."""
    q, k, v, grad_out = _inputs(1, 64, 4, 2, 64, torch.bfloat16)
    flash = _max_errors(6 * q, 3 * k, v, grad_out, 8, None, "flash")
    dense = _max_errors(6 * q, 3 * k, v, grad_out, 8, None, "dense")
    for error, dense_error in zip(flash, dense, strict=True):
        assert error <= 2.5 * dense_error


def test_large_scores_do_not_overflow():
    q, k, v, grad_out = _inputs(1, 32, 2, 2, 16, torch.float32)
    assert max(_max_errors(30 * q, 10 * k, v, grad_out, 4, None, "flash")) < 0.05
    out = block_causal_attention(1e3 * q, 1e3 * k, v, block_size=4, backend="flash")
    assert torch.isfinite(out).all()


def test_gradcheck():
    q, k, v, _ = _inputs(1, 12, 4, 2, 8)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for block_size, cu_seqlens in ((1, None), (2, [0, 4, 12]), (4, None)):
        assert torch.autograd.gradcheck(
            lambda *qkv, m=block_size, cu=cu_seqlens: block_causal_attention(
                *qkv, block_size=m, cu_seqlens=cu, backend="flash"
            ),
            inputs,
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["flash", "dense", "flex"])
def test_scale_layout_tensors_and_strided_inputs(backend):
    """A fused projection gives strided q, k, v; offsets come as a tensor or as a layout made once."""
    fused = _inputs(2, 32, 8, 2, 16)[0].repeat(1, 1, 1, 3)[:, :, :6]
    q, k, v = fused[..., :16], fused[:, :, :3, 16:32], fused[:, :, 3:, 32:]
    cu_seqlens = [0, 8, 32, 36, 64]
    expected = _reference(q, k, v, _reference_mask(2, 32, 4, cu_seqlens), scale=0.7)
    layout = BlockCausalLayout.build(2, 32, 4, cu_seqlens)
    for offsets in (
        cu_seqlens,
        torch.tensor(cu_seqlens, dtype=torch.int32),
        np.array(cu_seqlens),
        layout,
        layout,
    ):
        found = block_causal_attention(q, k, v, block_size=4, cu_seqlens=offsets, backend=backend, scale=0.7)
        assert found.shape == q.shape and (found - expected).abs().max() < 1e-12


def test_autocast_does_not_round_the_correction():
    q, k, v, _ = _inputs(1, 64, 4, 2, 16, torch.float32)
    plain = block_causal_attention(q, k, v, block_size=4, backend="flash")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_causal_attention(q, k, v, block_size=4, backend="flash"), plain)


def test_no_information_from_later_blocks_or_other_documents():
    q, k, v, _ = _inputs(1, 32, 4, 2, 16)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, 12:16] += 1
    changed_v[:, 12:16] += 1
    before = block_causal_attention(q, k, v, block_size=4, cu_seqlens=[0, 24, 32])
    after = block_causal_attention(q, changed_k, changed_v, block_size=4, cu_seqlens=[0, 24, 32])
    differs = (before != after).flatten(2).any(-1)[0]
    assert differs.tolist() == [False] * 12 + [True] * 12 + [False] * 8


def test_layout_groups_documents_by_length():
    layout = BlockCausalLayout.build(2, 32, 4, [0, 8, 20, 28, 32, 40, 48, 56, 64])
    assert [(g.num_documents, g.length) for g in layout.groups] == [(1, 4), (6, 8), (1, 12)]
    assert isinstance(layout.groups[0].rows, slice) and isinstance(layout.groups[1].rows, torch.Tensor)
    assert layout.max_seqlen == 12 and not layout.is_uniform
    assert BlockCausalLayout.build(2, 32, 4).is_uniform
    assert BlockCausalLayout.build(2, 32, 4, list(range(0, 65, 8))).groups[0].rows == slice(0, 64)
    mask = block_causal_mask(layout, CPU)
    assert torch.equal(mask[:, 0], _reference_mask(2, 32, 4, list(layout.cu_seqlens)))
    assert layout.offsets_on(CPU) is layout.offsets_on(CPU)


@pytest.mark.parametrize("behind", [None, [0, 4, 12]])
def test_cached_blocks_equal_the_full_pass(behind):
    """Rows may end at different places: `behind` the longest one."""
    block_size, seq_len = 4, 32
    q, k, v, _ = _inputs(3, seq_len, 8, 2, 16)
    full = block_causal_attention(q, k, v, block_size=block_size, backend="flash")
    for end in range(16, seq_len + 1, block_size):
        ends = [end - missing for missing in behind or [0, 0, 0]]
        newest = torch.stack([q[row, stop - block_size : stop] for row, stop in enumerate(ends)])
        expected = torch.stack([full[row, stop - block_size : stop] for row, stop in enumerate(ends)])
        stops = None if behind is None else torch.tensor(ends)
        found = cached_block_attention(newest, k[:, :end], v[:, :end], key_stop=stops)
        assert (found - expected).abs().max() < 1e-12


def test_choice_of_backend_and_its_reason():
    assert all(choose_backend(CPU, d, 64) == "flash" for d in (torch.float64, torch.float32, torch.bfloat16))
    cuda = torch.device("cuda")
    assert choose_backend(cuda, torch.float32, 64) == "dense"
    assert "bfloat16 or float16" in flash_obstacle(cuda, torch.float32, 64)
    assert "multiples of 8" in flash_obstacle(cuda, torch.bfloat16, 60)
    assert choose_backend(torch.device("mps"), torch.float32, 64) == "dense"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_on_cpu_refuses_gradients_in_one_sentence():
    q, k, v, _ = _inputs(1, 8, 2, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="FlexAttention has no backward on CPU"):
        block_causal_attention(q.requires_grad_(), k, v, block_size=4, backend="flex")
    with torch.no_grad():
        found = block_causal_attention(q, k, v, block_size=4, backend="flex")
        torch.testing.assert_close(found, block_causal_attention(q, k, v, block_size=4, backend="dense"))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"block_size": 3}, "not a whole number of blocks of 3"),
        ({"block_size": 64}, "not a whole number of blocks of 64"),
        ({"block_size": 4, "cu_seqlens": [0, 6, 16, 32]}, "multiples of the block size 4, got 6"),
        (
            {"block_size": 4, "cu_seqlens": [4, 16, 32]},
            "must run from 0 to the batch's 32 tokens, got 4 ... 32",
        ),
        ({"block_size": 4, "cu_seqlens": [0, 16]}, "must run from 0 to the batch's 32 tokens, got 0 ... 16"),
        ({"block_size": 4, "cu_seqlens": [0, 16, 16, 32]}, "must increase, got 16 followed by 16"),
        ({"block_size": 4, "cu_seqlens": [0, 8, 32]}, "token 16 is missing"),
        ({"block_size": 4, "cu_seqlens": [0.0, 32.0]}, "integers"),
        ({"block_size": 4, "cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "one axis"),
        ({"block_size": 4, "backend": "fast"}, "unknown attention backend 'fast'"),
        ({"block_size": 4, "cu_seqlens": BlockCausalLayout.build(2, 16, 8)}, "the layout is for"),
    ],
)
def test_bad_settings_are_refused(settings_, message):
    q, k, v, _ = _inputs(2, 16, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        block_causal_attention(q, k, v, **settings_)


def test_bad_shapes_are_refused():
    q, k, v, _ = _inputs(2, 16, 4, 2, 8)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        block_causal_attention(q, q[:, :, :3], q[:, :, :3], block_size=4)
    with pytest.raises(ValueError, match="do not fit together"):
        block_causal_attention(q, k, v[..., :4], block_size=4)
    with pytest.raises(ValueError, match="16 tokens a row"):
        block_causal_attention(q, k[:, :8], v[:, :8], block_size=4)
    with pytest.raises(ValueError, match="one dtype"):
        block_causal_attention(q.float(), k, v, block_size=4)
    with pytest.raises(ValueError, match="four axes"):
        block_causal_attention(q[0], k[0], v[0], block_size=4)
    with pytest.raises(ValueError, match="2 keys cannot include a block of 4"):
        cached_block_attention(q[:, :4], k[:, :2], v[:, :2])
    for stop in (3, 17):
        with pytest.raises(ValueError, match=rf"key_stop \[16, {stop}\] must lie in 4..16"):
            cached_block_attention(q[:, :4], k, v, key_stop=torch.tensor([16, stop]))
    with pytest.raises(ValueError, match="key_stop needs shape"):
        cached_block_attention(q[:, :4], k, v, key_stop=torch.tensor([4]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_cuda_backends_are_as_good_as_masked_attention(backend, heads, block_size, documents):
    q, k, v, grad_out = (x.cuda() for x in _inputs(2, 512, *heads, 64, torch.bfloat16))
    cu_seqlens = _some_documents(2, 512, block_size) if documents else None
    mask = _reference_mask(2, 512, block_size, cu_seqlens).cuda()
    wide = [x.double() for x in (q, k, v, grad_out)]
    expected = _values_and_grads(lambda *qkv: _reference(*qkv, mask), *wide)
    errors = {}
    for name in (backend, "dense"):
        found = _values_and_grads(
            lambda *qkv, name=name: block_causal_attention(
                *qkv, block_size=block_size, cu_seqlens=cu_seqlens, backend=name
            ),
            q, k, v, grad_out,
        )  # fmt: skip
        errors[name] = [(a.double() - b).abs().max().item() for a, b in zip(found, expected, strict=True)]
    for error, dense_error in zip(errors[backend], errors["dense"], strict=True):
        assert error <= 4 * dense_error
