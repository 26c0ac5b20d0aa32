"""Whose causal kernel a flash backend takes, and that each is called with what it understands.

The packages are stood in for by modules with their functions' exact signatures, computed as a dense softmax.
"""

import sys
import types

import pytest
import torch

from megatron_bitlm.method import attention, attention_flash, attention_flex
from megatron_bitlm.method.attention import BACKENDS, BlockCausalLayout, block_causal_attention, describe_backend
from megatron_bitlm.method.attention_causal import ATEN_KERNEL
from megatron_bitlm.method.attention_flash import FLASH_BACKENDS, FlashVariant, flash_block_causal_attention
from megatron_bitlm.method.attention_packages import PACKAGE_KERNELS, package_obstacle
from tests.method.test_attention import _inputs, _reference, _reference_mask, _values_and_grads

CUDA = torch.device("cuda")
DOCUMENTS = [0, 8, 32, 36, 64]


def causal_softmax(q, k, v, cu_seqlens, scale):
    """out [T, H, D] and lse [H, T], with graph."""
    documents = torch.bucketize(torch.arange(len(q)), cu_seqlens, right=True)
    mask = (documents[:, None] == documents) & (torch.arange(len(q)) <= torch.arange(len(q))[:, None])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~mask, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1), scores, k, v


def gradients(grad_out, q, k, v, out, lse, cu_seqlens, scale):
    """What a flash backward makes of a foreign out and lse."""
    _, _, scores, wide_k, wide_v = causal_softmax(q, k, v, cu_seqlens, scale)
    probability = (scores - lse[..., None]).exp()
    delta = (grad_out * out).sum(-1).t()[..., None]
    grad_scores = probability * (torch.einsum("ihd,jhd->hij", grad_out, wide_v) - delta) * scale
    grad_k = torch.einsum("hij,ihd->jhd", grad_scores, q).unflatten(1, (k.shape[1], -1)).sum(2)
    grad_v = torch.einsum("hij,ihd->jhd", probability, grad_out).unflatten(1, (k.shape[1], -1)).sum(2)
    return torch.einsum("hij,jhd->ihd", grad_scores, wide_k), grad_k, grad_v


def check_packed(cu_q, cu_k, max_q, max_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.tolist() == cu_k.tolist() == DOCUMENTS
    assert max_q == max_k == 28


def flash_attn2() -> types.SimpleNamespace:
    """Of flash-attn 2.8.4."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0,
    ):  # fmt: skip
        assert causal and dropout_p == 0 and window_size_left == window_size_right == -1
        check_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse, *_ = causal_softmax(q, k, v, cu_seqlens_q, softmax_scale)
        return out, lse, None, torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert causal and dropout_p == 0 and window_size_left == window_size_right == -1 and rng_state is not None
        check_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = gradients(dout, q, k, v, out, softmax_lse, cu_seqlens_q, softmax_scale)
        for buffer, value in zip((dq, dk, dv), found, strict=True):
            buffer.copy_(value)

    return types.SimpleNamespace(**locals())


def flash_attn3() -> types.SimpleNamespace:
    """Of FlashAttention 3's beta, as of 2026; unused arguments left out."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        page_table=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert causal
        check_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse, *_ = causal_softmax(q, k, v, cu_seqlens_q, softmax_scale)
        return out, lse, torch.tensor([]), torch.tensor([])

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert is_causal
        check_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = gradients(dout, q, k, v, out, softmax_lse, cu_seqlens_q, softmax_scale)
        for buffer, value in zip((dq, dk, dv), found, strict=True):
            buffer.copy_(value)

    return types.SimpleNamespace(**locals())


def transformer_engine() -> types.SimpleNamespace:
    """Of Transformer Engine 2.20; unused arguments left out."""
    FusedAttnBackend = {"F16_arbitrary_seqlen": object()}  # noqa: N806

    def check(max_q, max_kv, cu_q, cu_kv, padded, backend, layout, mask, window):
        assert all(x is cu_q for x in padded) and window == (-1, 0)
        assert cu_q.dtype == torch.int32 and cu_q.tolist() == cu_kv.tolist() == DOCUMENTS
        assert max_q == max_kv == 32 and layout == "thd_thd_thd" and mask == "padding_causal"
        assert backend is FusedAttnBackend["F16_arbitrary_seqlen"]

    def fused_attn_fwd(
        is_training, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype,
        fused_attention_backend, attn_bias=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None,
        attn_scale=None, dropout=0.0, qkv_layout="sbh3d", o_format="sbhd",
        attn_mask_type="padding", window_size=(-1, -1),
    ):  # fmt: skip
        assert is_training and o_format == "thd" and fake_dtype == q.dtype
        offsets = (cu_seqlens_q_padded, cu_seqlens_kv_padded)
        places = (max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, offsets, fused_attention_backend)
        check(*places, qkv_layout, attn_mask_type, window_size)
        out, lse, *_ = causal_softmax(q, k, v, cu_seqlens_q, attn_scale)
        return out, [lse.t().contiguous().unsqueeze(-1), torch.zeros(2)]

    def fused_attn_bwd(
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
        fused_attention_backend, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None,
        attn_scale=None, dropout=0.0, qkv_layout="sbh3d", o_format="sbhd", do_format="sbhd",
        dqkv_layout="sbh3d", attn_mask_type="padding", window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        assert o_format == do_format == "thd" and dqkv_layout == "thd_thd_thd"
        offsets = (cu_seqlens_q_padded, cu_seqlens_kv_padded)
        places = (max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, offsets, fused_attention_backend)
        check(*places, qkv_layout, attn_mask_type, window_size)
        stats, _ = aux_ctx_tensors
        assert stats.shape == (64, q.shape[1], 1) and stats.is_contiguous()
        return (*gradients(d_o, q, k, v, o, stats.squeeze(-1).t(), cu_seqlens_q, attn_scale), None)

    return types.SimpleNamespace(**locals())


PACKAGES = {
    "flash_attn2": ("flash_attn.flash_attn_interface", flash_attn2),
    "flash_attn3": ("flash_attn_interface", flash_attn3),
    "transformer_engine": ("transformer_engine.pytorch.cpp_extensions.fused_attn", transformer_engine),
}


@pytest.fixture
def install(monkeypatch):
    def install(name: str, **changes) -> None:
        path, make = PACKAGES[name]
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for key, value in {**vars(make()), **changes}.items():
            setattr(sys.modules[path], key, value)

    return install


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_given_what_they_take(install, name):
    assert "cannot be imported" in package_obstacle(name)
    install(name)
    assert package_obstacle(name) is None
    q, k, v, grad_out = _inputs(2, 32, 4, 2, 16)
    layout = BlockCausalLayout.build(2, 32, 4, DOCUMENTS)
    variant = FlashVariant(PACKAGE_KERNELS[name], fused=False)
    mask = _reference_mask(2, 32, 4, DOCUMENTS)
    expected = _values_and_grads(lambda *qkv: _reference(*qkv, mask), q, k, v, grad_out)
    found = _values_and_grads(
        lambda *qkv: flash_block_causal_attention(*qkv, layout, 16**-0.5, variant), q, k, v, grad_out
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_changed_packages_are_refused_before_they_run(install):
    def _flash_attn_varlen_forward(q, k, v, cu_seqlens, novelty, softmax_scale=1.0):
        """A later version's."""

    install("flash_attn2", _flash_attn_varlen_forward=_flash_attn_varlen_forward)
    obstacle = package_obstacle("flash_attn2")
    assert "_flash_attn_varlen_forward has another interface" in obstacle and "novelty" in obstacle
    install("flash_attn3", _flash_attn_backward=None)
    assert "no _flash_attn_backward" in package_obstacle("flash_attn3")

    def fused_attn_fwd(**options):
        return torch.zeros(64, 4, 16), [torch.zeros(4, 4, 28, 1), torch.zeros(2)]

    install("transformer_engine", fused_attn_fwd=fused_attn_fwd)
    q, k, v, _ = _inputs(2, 32, 4, 2, 16)
    with pytest.raises(ValueError, match="log-sum-exp of shape .* use the attention backend flash"):
        PACKAGE_KERNELS["transformer_engine"].forward(q, k, v, BlockCausalLayout.build(2, 32, 4, DOCUMENTS), 0.25)


def test_custom_operators_show_their_arguments(install):
    """flash-attn registers its functions as operators, which hide their signature."""

    @torch.library.custom_op("bitlm_test::forward", mutates_args=())
    def operator(q: torch.Tensor, softmax_scale: float, causal: bool = False) -> torch.Tensor:
        return q.clone()

    install("flash_attn2", _flash_attn_varlen_forward=operator)
    assert "arguments cu_seqlens_k, cu_seqlens_q, dropout_p, k, max_seqlen_k" in package_obstacle("flash_attn2")


def test_pytorchs_own_kernel_takes_what_it_is_given():
    """Shapes and arguments on the meta device, against the schemas of the installed PyTorch."""
    q, k = (torch.empty(2, 32, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    layout = BlockCausalLayout.build(2, 32, 4, DOCUMENTS)
    out, lse, state = ATEN_KERNEL.forward(q, k, k, layout, 0.125)
    assert out.shape == q.shape and lse.shape == (2, 32, 4) and lse.dtype == torch.float32
    grads = ATEN_KERNEL.backward(q, q, k, k, out, lse, state, layout, 0.125)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert layout.offsets_on(q.device).dtype == torch.int32


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), ["flash_attn3", "transformer_engine"], "flash_attn3"),
        ((9, 0), ["transformer_engine", "flash_attn2"], "transformer_engine"),
        ((10, 0), ["flash_attn3", "transformer_engine"], "transformer_engine"),  # FlashAttention 3 is Hopper's
        ((8, 0), ["transformer_engine", "flash_attn2"], "flash"),
        ((12, 0), ["transformer_engine"], "flash"),  # cuDNN pads the log-sum-exp there
        ((9, 0), [], "flash"),
        ((7, 5), ["transformer_engine"], "dense"),
    ],
)
def test_auto_takes_the_fastest_that_runs(monkeypatch, install, capability, installed, expected):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    for name in installed:
        install(name)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.choose_backend(CUDA, torch.bfloat16, 128) == expected


def test_obstacles_in_words(monkeypatch):
    monkeypatch.setattr(attention_flash.importlib.util, "find_spec", lambda name: None)
    half = torch.bfloat16
    assert "needs Triton, which is not installed" in attention.backend_obstacle("flash", CUDA, half, 128)
    assert attention.choose_backend(CUDA, half, 128) == "dense"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert attention.backend_obstacle("flash_eager", CUDA, half, 128) is None
    assert "up to 128, not 256" in attention.backend_obstacle("transformer_engine", CUDA, half, 256)
    for name in ("flash_attn2", "flash_attn3", "transformer_engine"):
        assert f"{name} runs on CUDA" in attention.backend_obstacle(name, torch.device("cpu"), half, 64)


def test_every_backend_has_words():
    words = {name: describe_backend(name, CUDA) for name in BACKENDS if name != "auto"}
    assert len(set(words.values())) == len(words)
    assert all("in Triton" in words[name] for name in FLASH_BACKENDS if name != "flash_eager")
    assert "composed" in words["flash_eager"] and "composed" in describe_backend("flash", torch.device("cpu"))


def test_eager_is_flash_on_cpu_and_unavailable_packages_are_named():
    q, k, v, _ = _inputs(1, 16, 4, 2, 16)
    flash, eager = (block_causal_attention(q, k, v, block_size=4, backend=name) for name in ("flash", "flash_eager"))
    assert torch.equal(flash, eager)
    with pytest.raises(ValueError, match="backend flash_attn2 cannot run: flash_attn2 runs on CUDA"):
        block_causal_attention(q, k, v, block_size=4, backend="flash_attn2")


@pytest.mark.parametrize("block_size", [3, 4, 48, 200])
@pytest.mark.parametrize("num_blocks", [1, 7, 30])
def test_flex_tiles_are_those_of_the_mask(block_size, num_blocks):
    seq_len = block_size * num_blocks
    offsets = sorted({0, seq_len // block_size // 3 * block_size, seq_len, 2 * seq_len - block_size, 2 * seq_len})
    layout = BlockCausalLayout.build(2, seq_len, block_size, offsets)
    mask = attention.block_causal_mask(layout, torch.device("cpu"))
    num_tiles = -(-seq_len // 128)
    padded = torch.zeros(2, 1, num_tiles * 128, num_tiles * 128, dtype=torch.bool)
    padded[:, :, :seq_len, :seq_len] = mask
    pairs = padded.view(2, 1, num_tiles, 128, num_tiles, 128).sum((3, 5))
    found = attention_flex.block_mask(layout, torch.device("cpu"))
    assert torch.equal(found.to_dense().bool(), pairs > 0)
    full = torch.zeros_like(pairs, dtype=torch.bool)
    for row in range(2):
        for tile in range(num_tiles):
            full[row, 0, tile, found.full_kv_indices[row, 0, tile, : found.full_kv_num_blocks[row, 0, tile]]] = True
    assert (pairs[full] == 128 * 128).all()
    if num_blocks == 30 and block_size == 200:
        assert full.any()
    assert attention_flex.block_mask(layout, torch.device("cpu")) is found
