"""Block-causal attention timed against masked and causal scaled-dot-product attention, forward and backward.

The contestants take turns in one process, so that a change of clock or load meets all of them alike:

- ``fast``: causal flash attention with the in-block correction, this package's default;
- ``masked_sdpa``: PyTorch's SDPA with the block-causal mask of the documents, made beforehand;
- ``causal_same_documents``: the causal part of ``fast`` alone (block size 1), what the correction adds to;
- ``causal_sdpa``: PyTorch's plain causal SDPA over whole rows, blind to documents;
- any further backend of this package by its name, where asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison, take_turns
from megatron_bitlm.benchmarks.memory import peak_memory
from megatron_bitlm.benchmarks.report import check_output, describe_device, make_report, publish
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.attention import (
    BlockCausalLayout,
    backend_obstacle,
    block_causal_attention,
    block_causal_mask,
    choose_backend,
)

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CONTESTANTS = ("fast", "masked_sdpa", "causal_same_documents", "causal_sdpa")


@dataclass(kw_only=True)
class AttentionBenchmark(BenchmarkConfig):
    """Attention alone, forward and backward.

    Attributes:
        seq_len: S, tokens of a row.
        batch_size: Rows.
        num_heads: Query heads.
        num_kv_heads: Key/value heads, which divide the query heads.
        head_dim: Channels of a head.
        block_size: m.
        mean_document_tokens: Mean length of documents, geometrically distributed; 0 makes each row one document.
        dtype: float32, float64, bfloat16 or float16.
        backends: Further backends of the same attention to time, each as a contestant of its name; what cannot run
            here is left out, and the report says why.
        memory: Also measure each contestant's peak memory, in a process of its own.
        seed: Of inputs and documents.
        num_repetitions: Turns that are counted.
    """

    seq_len: int = 4096
    batch_size: int = 1
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    block_size: int = 4
    mean_document_tokens: int = 0
    dtype: str = "float32"
    backends: list[str] = field(default_factory=list)
    memory: bool = False
    seed: int = 0
    num_repetitions: int = 7


def bench_attention(settings: AttentionBenchmark, output: Path | None = None) -> dict[str, Any]:
    """Times the contestants, prints a table and returns the figures (also as JSON in ``output``).

    Raises:
        BitLMError: settings that do not fit each other or the device, or an ``output`` that exists.
    """
    check_output(output)
    settings.validate()
    if settings.dtype not in _DTYPES:
        raise BitLMError(f"dtype {settings.dtype!r} is not one of {', '.join(_DTYPES)}")
    device, dtype = settings.torch_device(), _DTYPES[settings.dtype]
    machine = describe_device(device)
    try:
        layout = _layout(settings)
        _check_heads(settings)
        left_out = _left_out(settings, device, dtype)
    except ValueError as error:
        raise BitLMError(f"the attention benchmark cannot run: {error}") from error
    names = [*_CONTESTANTS, *(name for name in settings.backends if name not in left_out)]
    peaks = {name: peak_memory(build_call, settings, name, device) for name in names} if settings.memory else {}
    turns = take_turns(_contestants(settings, layout, device, names), settings, device)
    tokens = float(settings.batch_size * settings.seq_len)
    comparison = Comparison("fast", turns, dict.fromkeys(names, tokens), "tokens", peaks)
    num_documents = len(layout.cu_seqlens) - 1
    facts = {
        "backend": choose_backend(device, dtype, settings.head_dim),
        "num_documents": num_documents,
        "left_out": left_out,
    }
    title = (
        f"attention forward + backward: {settings.batch_size} x {settings.seq_len} tokens, {num_documents} documents, "
        f"{settings.num_heads}/{settings.num_kv_heads} heads of {settings.head_dim}, m = {settings.block_size}, "
        f"{settings.dtype}, fast is {facts['backend']}"
    )
    report = make_report("attention", settings, machine, comparison, facts)
    lines = [title, comparison.table(), *(f"{name} left out: {reason}" for name, reason in left_out.items())]
    return publish(report, "\n".join(lines), output)


def build_call(settings: AttentionBenchmark, name: str) -> Callable[[], object]:
    """One contestant alone: a call is one forward and backward pass."""
    return _contestants(settings, _layout(settings), settings.torch_device(), (name,))[name]


def _layout(settings: AttentionBenchmark) -> BlockCausalLayout:
    """Documents of geometric length with the wanted mean, cut at row ends as packing cuts them."""
    rows = settings.batch_size, settings.seq_len, settings.block_size
    if settings.mean_document_tokens == 0:
        return BlockCausalLayout.build(*rows)
    mean_blocks = settings.mean_document_tokens / settings.block_size
    if mean_blocks < 1:
        raise ValueError(f"a mean document of {settings.mean_document_tokens} tokens is shorter than a block")
    num_tokens = settings.batch_size * settings.seq_len
    lengths = np.random.default_rng(settings.seed).geometric(1 / mean_blocks, num_tokens // settings.block_size)
    ends = np.cumsum(lengths) * settings.block_size
    row_starts = range(0, num_tokens + 1, settings.seq_len)
    return BlockCausalLayout.build(*rows, sorted({*ends[ends < num_tokens].tolist(), *row_starts}))


def _left_out(settings: AttentionBenchmark, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Why backends that were asked for cannot run here.

    Raises:
        ValueError: One that does not exist.
    """
    found = {name: backend_obstacle(name, device, dtype, settings.head_dim) for name in settings.backends}
    if device.type == "cpu" and "flex" in found:
        found["flex"] = "FlexAttention has no backward pass on a CPU"
    return {name: obstacle for name, obstacle in found.items() if obstacle is not None}


def _check_heads(settings: AttentionBenchmark) -> None:
    if settings.num_kv_heads < 1 or settings.num_heads % settings.num_kv_heads:
        raise ValueError(f"{settings.num_heads} heads cannot share {settings.num_kv_heads} key heads evenly")


def _contestants(
    settings: AttentionBenchmark,
    layout: BlockCausalLayout,
    device: torch.device,
    names: Sequence[str] = _CONTESTANTS,
) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(settings.seed)

    def draw(num_heads: int) -> Tensor:
        shape = (settings.batch_size, settings.seq_len, num_heads, settings.head_dim)
        return torch.randn(shape, generator=generator).to(device, _DTYPES[settings.dtype])

    q, k, v = (draw(heads).requires_grad_() for heads in (settings.num_heads, *2 * [settings.num_kv_heads]))
    grad_out = draw(settings.num_heads)
    causal_layout = BlockCausalLayout.build(layout.batch_size, layout.seq_len, 1, layout.cu_seqlens)
    mask = _additive_mask(layout, q.dtype, device) if "masked_sdpa" in names else None
    grouped = settings.num_heads != settings.num_kv_heads

    def sdpa(attn_mask: Tensor | None) -> Tensor:
        keys, values = k, v
        shares_heads = grouped
        if grouped and attn_mask is not None and device.type == "cuda":
            # With a mask and shared key heads PyTorch has only its plainest kernel, which keeps the S x S weights.
            repeats = settings.num_heads // settings.num_kv_heads
            keys, values = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
            shares_heads = False
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, keys, values)),
            attn_mask=attn_mask,
            is_causal=attn_mask is None,
            enable_gqa=shares_heads,
        )
        return out.transpose(1, 2)

    def forward_backward(attend: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(), (q, k, v), grad_out)

    def block_causal(layout: BlockCausalLayout, backend: str = "auto") -> Tensor:
        return block_causal_attention(q, k, v, block_size=layout.block_size, cu_seqlens=layout, backend=backend)

    attends: dict[str, Callable[[], Tensor]] = {
        "fast": lambda: block_causal(layout),
        "masked_sdpa": lambda: sdpa(mask),
        "causal_same_documents": lambda: block_causal(causal_layout),
        "causal_sdpa": lambda: sdpa(None),
    }
    for backend in settings.backends:
        attends[backend] = partial(block_causal, layout, backend)
    return {name: forward_backward(attends[name]) for name in names}


def _additive_mask(layout: BlockCausalLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask in the dtype of the scores: a boolean one would be converted anew at every call."""
    hidden = ~block_causal_mask(layout, device)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
