"""Every attention backend that runs on this GPU, against a float32 softmax over the whole mask."""

import pytest
import torch

from megatron_bitlm.method.attention import (
    BACKENDS,
    BlockCausalLayout,
    backend_obstacle,
    block_causal_attention,
    choose_backend,
    describe_backend,
)
from megatron_bitlm.method.attention_shard import SequenceShard, shard_block_causal_attention
from tests.method.test_attention import _inputs, _some_documents, _values_and_grads

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
FAST = [name for name in BACKENDS if name not in ("auto", "dense")]


def need(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    obstacle = backend_obstacle(backend, CUDA, dtype, head_dim)
    if obstacle is not None:
        pytest.skip(f"{backend}: {obstacle}")


def cuda_inputs(batch_size, seq_len, heads, head_dim, dtype):
    return [x.to(CUDA) for x in _inputs(batch_size, seq_len, *heads, head_dim, dtype)]


def relative_errors(inputs, layout, backend):
    """Of out and the gradients of q, k and v: norm of the difference over the norm."""

    def attend(backend):
        return lambda *qkv: block_causal_attention(
            *qkv, block_size=layout.block_size, cu_seqlens=layout, backend=backend
        )

    expected = _values_and_grads(attend("dense"), *(x.float() for x in inputs))
    found = _values_and_grads(attend(backend), *inputs)
    assert all(torch.isfinite(x).all() for x in found)
    pairs = zip(found, expected, strict=True)
    return [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.fixture(autouse=True)
def exact_float32():
    """The reference's products in full float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((16, 8), 128, 4), ((4, 4), 64, 2), ((8, 1), 64, 8), ((4, 2), 128, 16), ((4, 2), 128, 64), ((4, 2), 96, 1)],
)
@pytest.mark.parametrize("backend", FAST)
def test_equals_a_softmax_over_the_mask(backend, heads, head_dim, block_size, dtype, tolerance, packed):
    need(backend, dtype, head_dim)
    inputs = cuda_inputs(2, 1024, heads, head_dim, dtype)
    documents = _some_documents(2, 1024, block_size, cuts=9) if packed else None
    layout = BlockCausalLayout.build(2, 1024, block_size, documents)
    assert max(relative_errors(inputs, layout, backend)) < tolerance


@pytest.mark.parametrize("seq_len", [4096, 8192])
@pytest.mark.parametrize("backend", FAST)
def test_long_packed_rows(backend, seq_len):
    need(backend, torch.bfloat16, 128)
    inputs = cuda_inputs(1, seq_len, (4, 2), 128, torch.bfloat16)
    layout = BlockCausalLayout.build(1, seq_len, 4, _some_documents(1, seq_len, 4, cuts=12))
    assert max(relative_errors(inputs, layout, backend)) < 1.5e-2


@pytest.mark.parametrize("backend", [name for name in FAST if name not in ("flash", "flex")])
def test_agrees_with_flash_more_closely_than_with_the_reference(backend):
    """Large scores, where a wrong log-sum-exp or a missing key shows most."""
    need(backend, torch.bfloat16, 128)
    q, k, v, grad_out = cuda_inputs(1, 512, (4, 2), 128, torch.bfloat16)
    layout = BlockCausalLayout.build(1, 512, 4, [0, 64, 72, 512])
    found = {}
    for name in ("flash", backend):
        attend = lambda *qkv, name=name: block_causal_attention(*qkv, block_size=4, cu_seqlens=layout, backend=name)  # noqa: E731
        found[name] = _values_and_grads(attend, 3 * q, 2 * k, v, grad_out)
    for one, other in zip(found["flash"], found[backend], strict=True):
        assert ((one - other).float().norm() / other.float().norm()).item() < 1e-2


@pytest.mark.parametrize("backend", ["flash", "flash_eager", "flash_attn2", "flash_attn3", "transformer_engine"])
def test_shares_of_a_row_equal_the_whole(backend):
    need(backend, torch.bfloat16, 128)
    q, k, v, grad_out = cuda_inputs(2, 512, (4, 2), 128, torch.bfloat16)
    whole = BlockCausalLayout.build(2, 512, 4, [0, 100, 512, 800, 1024])

    def shares(q, k, v):
        out = torch.empty_like(q)
        for rank in range(2):
            shard = SequenceShard.build(whole, rank, 2)
            part = shard_block_causal_attention(shard.take(q), k, v, shard=shard, backend=backend)
            out = out.index_copy(1, shard.tokens_on(CUDA), part)
        return out

    expected = _values_and_grads(
        lambda *qkv: block_causal_attention(*qkv, block_size=4, cu_seqlens=whole, backend="dense"),
        *(x.float() for x in (q, k, v, grad_out)),
    )
    found = _values_and_grads(shares, q, k, v, grad_out)
    for one, other in zip(found, expected, strict=True):
        assert ((one.float() - other).norm() / other.norm()).item() < 1.5e-2


@pytest.mark.parametrize("backend", FAST)
def test_memory_is_linear_in_the_sequence(backend):
    """Beyond inputs, output and gradients less than a bool mask of 16,384 x 16,384 would take."""
    need(backend, torch.bfloat16, 128)
    q, k, v, grad_out = (x.requires_grad_() for x in cuda_inputs(1, 16384, (4, 2), 128, torch.bfloat16))
    layout = BlockCausalLayout.build(1, 16384, 4, _some_documents(1, 16384, 4, cuts=20))

    def step():
        out = block_causal_attention(q, k, v, block_size=4, cu_seqlens=layout, backend=backend)
        torch.autograd.grad(out, (q, k, v), grad_out)

    step()  # compiles, and makes the layout's tensors
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    results = 2 * (q.nbytes + k.nbytes) + q.nbytes
    assert torch.cuda.max_memory_allocated() - before - results < 16384**2


def test_in_block_gradients_are_the_same_every_time():
    """The fused kernels add in a fixed order; PyTorch's own backward is asked to."""
    need("flash", torch.bfloat16, 128)
    inputs = cuda_inputs(1, 512, (8, 1), 128, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            _values_and_grads(lambda *qkv: block_causal_attention(*qkv, block_size=4, backend="flash"), *inputs)
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for one in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, runs[0], strict=True))


def test_auto_is_a_flash_backend_and_says_which():
    chosen = choose_backend(CUDA, torch.bfloat16, 128)
    assert backend_obstacle(chosen, CUDA, torch.bfloat16, 128) is None
    assert chosen != "dense" and "in Triton" in describe_backend(chosen, CUDA)
    assert choose_backend(CUDA, torch.float32, 128) == "dense"
