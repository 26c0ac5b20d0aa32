"""Attention of the slots of each block to one another: many problems of size m x m, one a block and head.

On CUDA a flash kernel would spend a tile of 64 or 128 rows on each block of a few slots, so there whole blocks share a
tile of one Triton kernel each way (slot_attention_triton.py), which reads queries, keys and values where the projection
left them and keeps nothing else for backward. On CPU PyTorch's own kernel is as fast as anything composed of its
operators.

Legend: N blocks, M slots of a block, W width.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

# Imported by name: an exported model holds this file, but not the kernels, which not everyone can import.
_KERNELS = ".slot_attention_triton"
_MAX_FUSED_SLOTS = 64


def slot_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Every slot attends to all slots of its block.

    Args:
        qkv: queries, keys and values side by side, [N, M, 3W]; in each, heads lie side by side.
        num_heads: divides W.

    Returns:
        [N, M, W].
    """
    if fused_slot_obstacle(qkv.device, qkv.dtype, qkv.shape[1]) is None:
        return importlib.import_module(_KERNELS, __package__).fused_slot_attention(qkv, num_heads)
    num_blocks, num_slots, _ = qkv.shape
    q, k, v = qkv.view(num_blocks, num_slots, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def fused_slot_obstacle(device: torch.device, dtype: torch.dtype, num_slots: int) -> str | None:
    """Why the slots do not go through the Triton kernel, as a clause; None when they do."""
    if device.type != "cuda":
        return "the kernel is for CUDA"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    if num_slots > _MAX_FUSED_SLOTS:
        return f"it takes blocks of up to {_MAX_FUSED_SLOTS} slots, not {num_slots}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if importlib.util.find_spec(_KERNELS, __package__) is None:
        return "an exported model comes without the kernel"
    return None
