"""Model FLOPs of a training token and the peak of known devices, for MFU."""

from __future__ import annotations

import torch

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.head import DiffusionHead
from megatron_bitlm.model.build import ModelConfig

# Dense BF16 peaks in FLOP/s, from the vendors' data sheets.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def backbone_parameters(config: ModelConfig) -> int:
    """Weights of the transformer's matrices: L (2 d 128 H + 2 d 128 H_kv + 3 d f)."""
    b = config.resolve_backbone()
    attention = 2 * b.hidden_size * b.head_dim * (b.num_attention_heads + b.num_query_groups)
    return b.num_layers * (attention + 3 * b.hidden_size * b.ffn_hidden_size)


def head_parameters(config: ModelConfig, num_bits: int) -> int:
    """Parameters of the diffusion head, counted on a model without storage."""
    with torch.device("meta"):
        head = DiffusionHead(
            config.head,
            num_bits=num_bits,
            block_size=config.block_size,
            condition_size=config.resolve_backbone().hidden_size,
        )
    return sum(p.numel() for p in head.parameters())


def training_flops_per_token(
    config: ModelConfig, num_bits: int, samples_per_block: int, mean_visible_keys: float
) -> float:
    """Forward and backward FLOPs of a token: 6 per weight (the head once per noisy copy) and attention's 12 c H_d L."""
    b = config.resolve_backbone()
    attention = 12 * mean_visible_keys * b.head_dim * b.num_attention_heads * b.num_layers
    return 6 * backbone_parameters(config) + attention + 6 * samples_per_block * head_parameters(config, num_bits)


def device_peak(override: float | None, device: torch.device) -> float | None:
    """Peak FLOP/s of a device: the setting, or the known figure, or None (then MFU is not reported).

    Raises:
        BitLMError: The setting is not positive.
    """
    if override is not None:
        if override <= 0:
            raise BitLMError(f"training.peak_flops_per_device must be positive, got {override}")
        return override
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)
