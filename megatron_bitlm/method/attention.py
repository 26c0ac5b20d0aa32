"""Block-causal attention (BitLM, arXiv 2605.11577, eq. 16).

Token i sees token j of its own document if and only if floor(j/m) <= floor(i/m), m being the block size; with
m = 1 this is causal attention. Every backend computes the same function: ``dense`` (a mask, any device and
dtype), the flash backends (causal flash attention plus the later keys of each block, merged exactly; they differ in
whose causal kernel they take, see attention_flash.py) and ``flex`` (FlexAttention).

Legend: B batch, S sequence, T cached keys, M slots of a block, H query heads, Hk key heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bitlm.method.attention_flash import (
    FLASH_BACKENDS,
    flash_block_causal_attention,
    flash_obstacle,
    flash_variant,
)
from megatron_bitlm.method.attention_flex import flex_block_causal_attention
from megatron_bitlm.method.attention_layout import BlockCausalLayout

BACKENDS = ("auto", "dense", *FLASH_BACKENDS, "flex")
_BACKENDS_IN_WORDS = {
    "dense": "dense attention (a mask over all keys)",
    "flash": "flash attention (PyTorch's causal kernel",
    "flash_eager": "flash attention (PyTorch's causal kernel",
    "flash_attn2": "flash attention (flash-attn 2's causal kernel",
    "flash_attn3": "flash attention (FlashAttention 3's causal kernel",
    "transformer_engine": "flash attention (Transformer Engine's causal kernel",
    "flex": "FlexAttention",
}


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    cu_seqlens: Tensor | Sequence[int] | BlockCausalLayout | None = None,
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """Attention within documents, causal between blocks and bidirectional inside a block (eq. 16).

    Args:
        q: queries [B, S, H, d].
        k: keys [B, S, Hk, d]; query head h uses key head h // (H / Hk).
        v: values [B, S, Hk, d].
        block_size: m, tokens per block; S and every document are whole numbers of blocks.
        cu_seqlens: document offsets into the B*S flattened tokens, 0 ... B*S, every row's start among them;
            None makes each row one document. A ``BlockCausalLayout`` built once per batch saves every layer
            the checks, the device-to-host copy and, for dense and flex, the mask.
        backend: one of ``BACKENDS``; ``auto`` is the one ``choose_backend`` names.
        scale: factor of the scores; None is 1/sqrt(d).

    Returns:
        [B, S, H, d], dtype of q.

    Raises:
        ValueError: shapes, dtypes, offsets or block size that do not fit, an unknown backend, or one that
            cannot run on these tensors.
    """
    check_heads(q, k, v)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens a row and k and v have {k.shape[1]}")
    layout = _layout_of(q, block_size, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = usable_backend(backend, q, layout)
    if backend in FLASH_BACKENDS:
        return flash_block_causal_attention(q, k, v, layout, scale, flash_variant(backend, q.device))
    if backend == "flex":
        return flex_block_causal_attention(q, k, v, layout, scale)
    mask = layout.keep("dense_mask", q.device, lambda: block_causal_mask(layout, q.device))
    return masked_attention(q, k, v, mask, scale)


def usable_backend(backend: str, q: Tensor, layout: BlockCausalLayout) -> str:
    """``backend``, or what ``auto`` means for queries like q; looked up once a layout.

    Raises:
        ValueError: an unknown backend, or one that cannot run on such tensors.
    """

    def choose() -> str:
        if backend == "auto":
            return choose_backend(q.device, q.dtype, q.shape[-1])
        obstacle = backend_obstacle(backend, q.device, q.dtype, q.shape[-1])
        if obstacle is not None:
            raise ValueError(f"the attention backend {backend} cannot run: {obstacle}; use auto or dense")
        return backend

    return layout.keep(f"backend {backend}, {q.dtype}, {q.shape[-1]}", q.device, choose)


def backend_obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot run on such tensors, as a clause; None when it can.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    return flash_obstacle(device, dtype, head_dim, backend) if backend in FLASH_BACKENDS else None


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What ``auto`` means: the fastest flash backend that runs here, else ``dense``.

    On Hopper and later that is FlashAttention 3, then cuDNN's kernel through Transformer Engine, which outrun
    FlashAttention 2 there; everywhere else PyTorch's own kernel, which is FlashAttention 2, as the package is.
    ``flash_obstacle`` of the same arguments says in words why it is not flash. ``dense`` takes memory quadratic in the
    sequence length.
    """
    if flash_obstacle(device, dtype, head_dim) is not None:
        return "dense"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        for backend in ("flash_attn3", "transformer_engine"):
            if flash_obstacle(device, dtype, head_dim, backend) is None:
                return backend
    return "flash"


def describe_backend(backend: str, device: torch.device) -> str:
    """A backend (not ``auto``) in words: whose kernel, and how the later keys of a block are added."""
    words = _BACKENDS_IN_WORDS[backend]
    if backend not in FLASH_BACKENDS:
        return words
    return f"{words}, in-block part {'in Triton' if flash_variant(backend, device).fused else 'composed'})"


def block_causal_mask(layout: BlockCausalLayout, device: torch.device) -> Tensor:
    """Eq. 16 within documents as a mask, True where a query sees a key: bool [B, 1, S, S]."""
    block_s = torch.arange(layout.seq_len, device=device) // layout.block_size
    document_bs = layout.document_ids_on(device)
    same_document = document_bs[:, :, None] == document_bs[:, None, :]
    return (same_document & (block_s <= block_s[:, None])).unsqueeze(1)


def cached_block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_stop: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention of the newest block to everything so far, its own slots included (decoding).

    Args:
        q: queries of the newest block [B, M, H, d].
        k: all keys so far [B, T, Hk, d]; the last M before a row's end are the newest block's.
        v: all values so far [B, T, Hk, d].
        key_stop: int64 [B], end of each row's keys, in M..T, which is not checked on a GPU (reading it back would
            stall decoding); None means T. What lies behind it may be anything but NaN.
        scale: factor of the scores; None is 1/sqrt(d).

    Returns:
        [B, M, H, d], dtype of q.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a ``key_stop`` outside M..T.
    """
    check_heads(q, k, v)
    num_keys, num_slots = k.shape[1], q.shape[1]
    if num_keys < num_slots:
        raise ValueError(f"{num_keys} keys cannot include a block of {num_slots}")
    mask = None
    if key_stop is not None:
        if key_stop.shape != (q.shape[0],):
            raise ValueError(f"key_stop needs shape ({q.shape[0]},), got {tuple(key_stop.shape)}")
        if key_stop.device.type == "cpu" and bool(((key_stop < num_slots) | (key_stop > num_keys)).any()):
            raise ValueError(f"key_stop {key_stop.tolist()} must lie in {num_slots}..{num_keys}")
        mask = (torch.arange(num_keys, device=q.device) < key_stop[:, None])[:, None, None, :]
    return masked_attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention [B, S, H, d] to keys [B, T, Hk, d] where the mask, bool [B, 1, S, T], is True."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _layout_of(
    q: Tensor, block_size: int, cu_seqlens: Tensor | Sequence[int] | BlockCausalLayout | None
) -> BlockCausalLayout:
    batch_size, seq_len = q.shape[:2]
    if not isinstance(cu_seqlens, BlockCausalLayout):
        return BlockCausalLayout.build(batch_size, seq_len, block_size, cu_seqlens)
    found = (cu_seqlens.batch_size, cu_seqlens.seq_len, cu_seqlens.block_size)
    if found != (batch_size, seq_len, block_size):
        raise ValueError(
            f"the layout is for batch, sequence and block size {found}, the call has "
            f"{(batch_size, seq_len, block_size)}"
        )
    return cu_seqlens


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless queries, keys and values fit together but for their lengths."""
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v need four axes, got shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v do not fit together: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v need one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
