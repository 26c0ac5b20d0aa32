"""Model FLOPs of a run's tokens, and the peak of its devices, for MFU."""

from __future__ import annotations

import torch

from megatron_bitlm.model.flops import TokenFlops, mean_visible_keys, token_flops
from megatron_bitlm.parallel.hardware import gpu_of_device
from megatron_bitlm.training.config import RunConfig


def run_flops(config: RunConfig, vocab_size: int) -> TokenFlops:
    """Model FLOPs of a token of a run whose samples are each one document."""
    visible = mean_visible_keys(config.data.sequence_length, config.model.attention_block_size)
    return token_flops(config.model, vocab_size, config.objective.samples_per_block, visible)


def device_peak(config: RunConfig, device: torch.device) -> float | None:
    """Peak FLOP/s of a device: the setting, or the known figure, or None (then MFU is not reported)."""
    if config.training.peak_flops_per_device is not None:
        return config.training.peak_flops_per_device
    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak(config.training.precision) if gpu else None
