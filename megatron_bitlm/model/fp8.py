"""FP8 matrix products through Transformer Engine: which recipe, and where they are safe.

Weights, gradients, moments and everything that is no matrix product stay as under bf16. In FP8 run the linears of the
backbone's layers (but the first and the last ones) and those of the head's layers with their modulations. In bf16 stay
the input of the codes, the time and the condition of the head, whose rows are few and whose values steer everything
behind them, and the projection to bits: B is no multiple of 16, and a bit's logit wants its small differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.head import LinearFactory

# Rows and columns of an FP8 matrix product come in multiples of this (cuBLASLt, and Transformer Engine's casts).
ALIGNMENT = 16


@dataclass
class Fp8Config:
    """FP8 matrix products on GPUs that have them (H100 and newer), with Transformer Engine's layers.

    Attributes:
        recipe: `none` is off. `tensorwise` scales each tensor by its own largest value; `blockwise` scales every 128
            values (128 x 128 of a weight); `delayed` scales by the largest values of earlier steps, the fastest and
            the least exact.
        format: `hybrid` is E4M3 forward and E5M2 for gradients; `e4m3` both ways.
        head: Also run the diffusion head's layers in FP8.
        num_bf16_layers_at_start: First layers of the backbone that stay in bf16. `delayed` needs 0 here and at the end.
        num_bf16_layers_at_end: Last layers of the backbone that stay in bf16.
        weight_gradient: Compute weight gradients in FP8, too; false is for `delayed` only.
        amax_history_length: Steps whose largest values `delayed` looks back to.
        amax_compute: What `delayed` takes of these: `max` or `most_recent`.
        margin: `delayed` scales down by two to this power.
    """

    recipe: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    format: Literal["hybrid", "e4m3"] = "hybrid"
    head: bool = True
    num_bf16_layers_at_start: int = 1
    num_bf16_layers_at_end: int = 1
    weight_gradient: bool = True
    amax_history_length: int = 1024
    amax_compute: Literal["max", "most_recent"] = "max"
    margin: int = 0

    @property
    def enabled(self) -> bool:
        """Whether any product runs in FP8."""
        return self.recipe != "none"

    def validate(self, precision: str, num_layers: int, num_stages: int) -> None:
        """Check the settings against the run's precision and the backbone's layers.

        Raises:
            BitLMError: Names the setting, its value and what to set.
        """
        if self.recipe not in ("none", "delayed", "tensorwise", "blockwise"):
            raise BitLMError(f"training.fp8.recipe must be none, delayed, tensorwise or blockwise, got {self.recipe!r}")
        if not self.enabled:
            return
        if precision != "bf16":
            raise BitLMError(
                f"training.fp8.recipe is {self.recipe}, but training.precision is {precision}; FP8 goes with bf16"
            )
        if self.amax_history_length < 1:
            raise BitLMError(f"training.fp8.amax_history_length must be at least 1, got {self.amax_history_length}")
        if self.recipe != "delayed" and not self.weight_gradient:
            raise BitLMError(f"training.fp8.weight_gradient false goes with recipe delayed only, got {self.recipe}")
        for name in ("num_bf16_layers_at_start", "num_bf16_layers_at_end"):
            count = getattr(self, name)
            if self.recipe == "delayed" and count:
                raise BitLMError(
                    f"training.fp8.{name} is {count}, but recipe delayed reduces its history once a pass and cannot "
                    "leave layers out; set num_bf16_layers_at_start and num_bf16_layers_at_end to 0"
                )
            if not 0 <= count <= num_layers // num_stages:
                raise BitLMError(
                    f"training.fp8.{name} must lie in 0..{num_layers // num_stages}, the layers of a pipeline stage, "
                    f"got {count}"
                )

    def megatron_settings(self) -> dict[str, Any]:
        """megatron-core's settings of the same."""
        if not self.enabled:
            return {}
        return {
            "fp8": self.format,
            "fp8_recipe": self.recipe,
            "fp8_wgrad": self.weight_gradient,
            "fp8_margin": self.margin,
            "fp8_amax_history_len": self.amax_history_length,
            "fp8_amax_compute_algo": self.amax_compute,
            "first_last_layers_bf16": bool(self.num_bf16_layers_at_start or self.num_bf16_layers_at_end),
            "num_layers_at_start_in_bf16": self.num_bf16_layers_at_start,
            "num_layers_at_end_in_bf16": self.num_bf16_layers_at_end,
        }


def check_fp8_shapes(sizes: Mapping[str, int]) -> None:
    """Raise BitLMError naming the first size that is no multiple of 16.

    Args:
        sizes: Rows or columns of FP8 products, by what decides them.
    """
    for setting, size in sizes.items():
        if size % ALIGNMENT:
            raise BitLMError(
                f"{setting} is {size}, and FP8 products take multiples of {ALIGNMENT}; change it or set "
                "training.fp8.recipe to none"
            )


def require_fp8(fp8: Fp8Config, implementation: str) -> None:
    """Check that this process's GPU and Transformer Engine can do what `fp8` asks for.

    Raises:
        BitLMError: Local layers, no Transformer Engine, or a GPU without the recipe.
    """
    if not fp8.enabled:
        return
    if not HAVE_TE or implementation != "transformer_engine":
        missing = "model.implementation is local" if HAVE_TE else "Transformer Engine is not installed"
        raise BitLMError(
            f"training.fp8.recipe is {fp8.recipe}, but {missing}; FP8 needs Transformer Engine's layers: install "
            "megatron-bitlm[cuda], or set training.fp8.recipe to none"
        )
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    check = FP8GlobalStateManager.is_fp8_available
    if fp8.recipe == "blockwise":
        check = FP8GlobalStateManager.is_fp8_block_scaling_available
    available, reason = check()
    if not available:
        raise BitLMError(
            f"training.fp8.recipe is {fp8.recipe}, but this GPU or its libraries cannot: {reason}; "
            "set training.fp8.recipe to none"
        )


def head_linear(config: TransformerConfig, implementation: str) -> LinearFactory:
    """The factory of the head's inner linears: torch's, or Transformer Engine's with fused gradient accumulation."""
    if implementation != "transformer_engine":
        return torch.nn.Linear
    import transformer_engine.pytorch as te

    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    return partial(
        te.Linear,
        params_dtype=config.params_dtype,
        fuse_wgrad_accumulation=config.gradient_accumulation_fusion,
        device=device,
    )


def head_context(config: TransformerConfig) -> AbstractContextManager[object]:
    """The context in which the head's Transformer Engine linears run in FP8, as the backbone's layers do."""
    return get_fp8_context(config)
