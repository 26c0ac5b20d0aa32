"""A rank's share of block-causal attention against the whole of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bitlm.method.attention import block_causal_attention
from megatron_bitlm.method.attention_layout import BlockCausalLayout
from megatron_bitlm.method.attention_shard import SequenceShard, shard_block_causal_attention

CPU = torch.device("cpu")


def inputs(batch_size, seq_len, heads, dtype=torch.float64, device="cpu"):
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch_size, seq_len, count, 8, generator=generator, dtype=torch.float64).to(device, dtype)
        for count in (heads[0], heads[1], heads[1], heads[0])
    ]


def documents(batch_size, seq_len, block_size, cuts) -> list[int]:
    blocks = {cut % (batch_size * seq_len // block_size) * block_size for cut in cuts}
    return sorted(blocks | set(range(0, batch_size * seq_len + 1, seq_len)))


def whole_pass(tensors, layout):
    """Output and gradients of q, k and v of the dense attention over whole rows."""
    q, k, v, grad = (x.clone().requires_grad_() for x in tensors)
    out = block_causal_attention(q, k, v, block_size=layout.block_size, cu_seqlens=layout, backend="dense")
    return out.detach(), torch.autograd.grad(out, (q, k, v), grad)


def shares_pass(tensors, layout, num_ranks, backend):
    """The same from the shares: outputs and query gradients put together, gradients of keys and values added up."""
    out, *grads = (torch.zeros_like(x) for x in (tensors[0], *tensors[:3]))
    for rank in range(num_ranks):
        shard = SequenceShard.build(layout, rank, num_ranks)
        q, grad = (shard.take(x) for x in (tensors[0], tensors[3]))
        q, k, v = (x.clone().requires_grad_() for x in (q, *tensors[1:3]))
        own = shard_block_causal_attention(q, k, v, shard=shard, backend=backend)
        found = torch.autograd.grad(own, (q, k, v), grad)
        tokens = shard.tokens_on(q.device)
        out[:, tokens], grads[0][:, tokens] = own.detach(), found[0]
        grads[1] += found[1]
        grads[2] += found[2]
    return out, grads


def check(tensors, layout, num_ranks, backend, tolerance):
    expected, expected_grads = whole_pass(tensors, layout)
    out, grads = shares_pass(tensors, layout, num_ranks, backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@given(
    num_ranks=st.sampled_from([1, 2, 3]),
    batch_size=st.integers(1, 3),
    block_size=st.sampled_from([1, 2, 4]),
    blocks_a_chunk=st.integers(1, 3),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
    backend=st.sampled_from(["dense", "flash"]),
)
@settings(max_examples=60)
def test_shares_put_together_are_the_whole(num_ranks, batch_size, block_size, blocks_a_chunk, heads, cuts, backend):
    seq_len = 2 * num_ranks * blocks_a_chunk * block_size
    offsets = documents(batch_size, seq_len, block_size, cuts)
    layout = BlockCausalLayout.build(batch_size, seq_len, block_size, offsets)
    check(inputs(batch_size, seq_len, heads), layout, num_ranks, backend, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("backend", ["dense", "flash"])
def test_other_precisions(dtype, tolerance, backend):
    layout = BlockCausalLayout.build(2, 256, 4, documents(2, 256, 4, [3, 40, 41, 90]))
    tensors = inputs(2, 256, (4, 2), dtype)
    wide, wide_grads = whole_pass([x.double() for x in tensors], layout)
    out, grads = shares_pass(tensors, layout, 2, backend)
    assert out.dtype == dtype
    for ours, theirs in zip((out, *grads), (wide, *wide_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_chunks_are_paired_and_blocks_numbered():
    layout = BlockCausalLayout.build(1, 32, 4)
    shards = [SequenceShard.build(layout, rank, 2) for rank in range(2)]
    assert [shard.blocks_on(CPU).tolist() for shard in shards] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert shards[0].tokens_on(CPU).tolist() == [*range(8), *range(24, 32)]
    assert sorted(torch.cat([shard.take(torch.arange(32), 0) for shard in shards]).tolist()) == list(range(32))


def test_ranks_share_the_pairs_evenly():
    layout = BlockCausalLayout.build(1, 512, 4)
    pairs = []
    for rank in range(4):
        shard = SequenceShard.build(layout, rank, 4)
        earlier = sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in shard.earlier)
        pairs.append(earlier)
    assert len(set(pairs)) == 1


def test_documents_inside_a_chunk_need_no_other_keys():
    layout = BlockCausalLayout.build(1, 32, 4, [0, 8, 16, 24, 32])
    assert all(not SequenceShard.build(layout, rank, 2).earlier for rank in range(2))


def test_a_chunk_that_cuts_a_block_is_refused():
    with pytest.raises(ValueError, match="24 tokens a row are not 4 equal chunks of whole blocks of 4"):
        SequenceShard.build(BlockCausalLayout.build(1, 24, 4), 0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2 does not exist"):
        SequenceShard.build(BlockCausalLayout.build(1, 32, 4), 2, 2)


def test_calls_that_do_not_fit_are_refused():
    layout = BlockCausalLayout.build(1, 32, 4)
    shard = SequenceShard.build(layout, 0, 2)
    q, k, v, _ = inputs(1, 32, (2, 2))
    with pytest.raises(ValueError, match="the share is for queries and keys of"):
        shard_block_causal_attention(q, k, v, shard=shard)
    own = shard.take(q)
    with pytest.raises(ValueError, match="'flex' cannot attend from a share"):
        shard_block_causal_attention(own, k, v, shard=shard, backend="flex")
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        shard_block_causal_attention(own, k, v, shard=shard, backend="fast")


@pytest.mark.gpu
def test_cuda_shares_put_together_are_the_whole():
    layout = BlockCausalLayout.build(2, 256, 4, documents(2, 256, 4, [3, 40, 41, 90]))
    tensors = inputs(2, 256, (4, 2), torch.bfloat16, "cuda")
    wide, wide_grads = whole_pass([x.double() for x in tensors], layout)
    out, grads = shares_pass(tensors, layout, 2, "flash")
    for ours, theirs in zip((out, *grads), (wide, *wide_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.06, atol=0.06)
