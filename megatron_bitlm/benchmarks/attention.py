"""Block-causal attention timed against masked and causal scaled-dot-product attention, forward and backward.

The contestants take turns in one process, so that a change of clock or load meets all of them alike:

- ``fast``: causal flash attention with the in-block correction, this package's default;
- ``masked_sdpa``: PyTorch's SDPA with the block-causal mask of the documents, made beforehand;
- ``causal_same_documents``: the causal part of ``fast`` alone (block size 1), what the correction adds to;
- ``causal_sdpa``: PyTorch's plain causal SDPA over whole rows, blind to documents.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.attention import (
    BlockCausalLayout,
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


@dataclass
class AttentionBenchmark:
    """What to time; with ``mean_document_tokens`` 0 each row is one document."""

    seq_len: int = 4096
    batch_size: int = 1
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    block_size: int = 4
    mean_document_tokens: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    num_warmup: int = 1
    num_repetitions: int = 7
    seed: int = 0


@dataclass
class Timing:
    """Milliseconds of one forward and backward pass of one contestant."""

    milliseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median over the repetitions."""
        return statistics.median(self.milliseconds)

    def summary(self, fast: Timing) -> dict[str, float | list[float]]:
        """Median, range, and the median over turns of its time divided by ``fast``'s in the same turn."""
        turns = zip(self.milliseconds, fast.milliseconds, strict=True)
        return {
            "median_ms": self.median,
            "min_ms": min(self.milliseconds),
            "max_ms": max(self.milliseconds),
            "ratio_to_fast": statistics.median(own / other for own, other in turns),
            "milliseconds": self.milliseconds,
        }


def bench_attention(settings: AttentionBenchmark, json_path: Path | None = None) -> dict[str, object]:
    """Times the contestants, prints a table and returns the figures (also as JSON in ``json_path``).

    Raises:
        BitLMError: settings that do not fit each other or the device, or a ``json_path`` that exists.
    """
    if json_path is not None and json_path.exists():
        raise BitLMError(f"{json_path} exists already; name another file for the figures of the benchmark")
    if settings.dtype not in _DTYPES:
        raise BitLMError(f"dtype {settings.dtype!r} is not one of {', '.join(_DTYPES)}")
    if settings.num_repetitions < 1 or settings.num_warmup < 0:
        raise BitLMError(f"num_repetitions must be at least 1, got {settings.num_repetitions}")
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BitLMError("device 'cuda' asked for, but PyTorch finds no CUDA device; use device cpu")
    try:
        layout = _layout(settings)
        contestants = _contestants(settings, layout, device)
    except ValueError as error:
        raise BitLMError(f"the attention benchmark cannot run: {error}") from error
    load_before = os.getloadavg()[0]
    timings = _take_turns(contestants, settings, device)
    report: dict[str, object] = {
        "settings": asdict(settings),
        "backend": choose_backend(device, _DTYPES[settings.dtype], settings.head_dim),
        "num_documents": len(layout.cu_seqlens) - 1,
        "torch": torch.__version__,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "load_average_before": load_before,
        "load_average_after": os.getloadavg()[0],
        "timings": {name: timing.summary(timings["fast"]) for name, timing in timings.items()},
    }
    print(_table(settings, report, timings))
    if json_path is not None:
        write_atomic(json_path, (json.dumps(report, indent=1) + "\n").encode())
    return report


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


def _contestants(
    settings: AttentionBenchmark, layout: BlockCausalLayout, device: torch.device
) -> dict[str, Callable[[], object]]:
    if settings.num_heads % settings.num_kv_heads:
        raise ValueError(f"{settings.num_heads} heads cannot share {settings.num_kv_heads} key heads evenly")
    generator = torch.Generator().manual_seed(settings.seed)

    def draw(num_heads: int) -> Tensor:
        shape = (settings.batch_size, settings.seq_len, num_heads, settings.head_dim)
        return torch.randn(shape, generator=generator).to(device, _DTYPES[settings.dtype])

    q, k, v = (draw(heads).requires_grad_() for heads in (settings.num_heads, *2 * [settings.num_kv_heads]))
    grad_out = draw(settings.num_heads)
    causal_layout = BlockCausalLayout.build(layout.batch_size, layout.seq_len, 1, layout.cu_seqlens)
    # The mask in the dtype of the scores: a boolean one would be converted anew at every call.
    hidden = ~block_causal_mask(layout, device)
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=device).masked_fill_(hidden, -torch.inf)
    grouped = settings.num_heads != settings.num_kv_heads

    def sdpa(attn_mask: Tensor | None) -> Tensor:
        heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            *heads_first, attn_mask=attn_mask, is_causal=attn_mask is None, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def forward_backward(attend: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(), (q, k, v), grad_out)

    def block_causal(layout: BlockCausalLayout) -> Tensor:
        return block_causal_attention(q, k, v, block_size=layout.block_size, cu_seqlens=layout)

    return {
        "fast": forward_backward(lambda: block_causal(layout)),
        "masked_sdpa": forward_backward(lambda: sdpa(mask)),
        "causal_same_documents": forward_backward(lambda: block_causal(causal_layout)),
        "causal_sdpa": forward_backward(lambda: sdpa(None)),
    }


def _take_turns(
    contestants: dict[str, Callable[[], object]], settings: AttentionBenchmark, device: torch.device
) -> dict[str, Timing]:
    timings = {name: Timing() for name in contestants}
    for repetition in range(settings.num_warmup + settings.num_repetitions):
        for name, run in contestants.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if repetition >= settings.num_warmup:
                timings[name].milliseconds.append((time.perf_counter() - start) * 1e3)
    return timings


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(settings: AttentionBenchmark, report: dict[str, object], timings: dict[str, Timing]) -> str:
    lines = [
        f"attention forward + backward: {settings.batch_size} x {settings.seq_len} tokens, "
        f"{report['num_documents']} documents, {settings.num_heads}/{settings.num_kv_heads} heads of "
        f"{settings.head_dim}, m = {settings.block_size}, {settings.dtype}, {report['device_name']}, "
        f"{report['num_threads']} threads, load {report['load_average_before']:.2f}",
        f"{'':24}{'median ms':>10}{'min':>10}{'max':>10}{'time / fast':>13}",
    ]
    for name, timing in timings.items():
        found = timing.summary(timings["fast"])
        lines.append(
            f"{name:24}{found['median_ms']:10.2f}{found['min_ms']:10.2f}{found['max_ms']:10.2f}"
            f"{found['ratio_to_fast']:13.2f}"
        )
    return "\n".join(lines)
