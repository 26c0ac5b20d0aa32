"""All denoising steps of a block as one CUDA graph: at small batches the launches of a light head cost more than it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bitlm.method.sampler import BlockSampler, SampledBlocks, SamplerConfig

_NUM_WARMUP_CALLS = 2


class GraphedSampler:
    """A block sampler whose plain calls are captured once for each batch size and replayed.

    Calls with known slots, fresh noise, an observer or early exit, which decide something on the way, run as they are.

    Args:
        sampler: What is called.
        enabled: Capture at all; needs a GPU.
    """

    def __init__(self, sampler: BlockSampler, *, enabled: bool) -> None:
        self.sampler, self.enabled = sampler, enabled and sampler.config.early_exit is None
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    @property
    def config(self) -> SamplerConfig:
        """The sampler's settings."""
        return self.sampler.config

    def __call__(self, condition: Tensor, initial_noise: Tensor, **options: Any) -> SampledBlocks:
        """As `BlockSampler.sample`."""
        if not self.enabled or any(option is not None for option in options.values()):
            return self.sampler.sample(condition, initial_noise, **options)
        key = tuple(condition.shape)
        if key not in self._graphs:
            self._graphs[key] = self._capture(condition, initial_noise)
        graph, own_condition, own_noise, final = self._graphs[key]
        own_condition.copy_(condition)
        own_noise.copy_(initial_noise)
        graph.replay()
        return SampledBlocks(final.clone(), [self.config.num_steps] * len(final))

    def _capture(self, condition: Tensor, initial_noise: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        condition, initial_noise = condition.clone(), initial_noise.clone()
        # Kernels are chosen and compiled, and workspaces allocated, on the first calls: not while capturing.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_NUM_WARMUP_CALLS):
                self.sampler.sample(condition, initial_noise)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            final = self.sampler.sample(condition, initial_noise).bits
        return graph, condition, initial_noise, final
