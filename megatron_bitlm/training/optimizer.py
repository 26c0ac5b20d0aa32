"""AdamW through megatron-core's optimizer, its learning-rate schedules, and gradient norms by part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import clip_grads, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_bitlm.errors import BitLMError

HEAD_ATTRIBUTE = "is_bitlm_head"


@dataclass
class OptimizerConfig:
    """AdamW and its schedule (paper: lr 1e-4, betas 0.9 and 0.95).

    Attributes:
        learning_rate: Peak learning rate.
        head_learning_rate_multiplier: Factor on the head's learning rate (of the softmax baseline: its output layer's).
        min_learning_rate_ratio: Final over peak learning rate.
        schedule: `cosine`, `constant`, `linear` or `wsd` (warm-up, stable, decay).
        warmup_steps: Linear warm-up from 0.
        decay_steps: Length of the schedule in steps; null means training.num_steps.
        wsd_decay_steps: Steps of the final decay under `wsd`.
        beta1: First-moment decay.
        beta2: Second-moment decay.
        epsilon: Added to the root of the second moment; gradients of the element-mean loss are tiny at scale (RMS
            about 2e-8 at 8B), so it must be far below them.
        weight_decay: Decoupled; not applied to biases and one-dimensional parameters.
        clip_grad: Largest global gradient norm; 0 turns clipping off.
    """

    learning_rate: float = 1e-4
    head_learning_rate_multiplier: float = 1.0
    min_learning_rate_ratio: float = 0.1
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int | None = None
    wsd_decay_steps: int | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-15
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    def validate(self, num_steps: int) -> None:
        """Raise BitLMError naming the setting and its value."""
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            raise BitLMError(f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise BitLMError(
                f"optimizer.min_learning_rate_ratio must lie in [0, 1], got {self.min_learning_rate_ratio}"
            )
        if self.decay_steps is not None and self.decay_steps < 1:
            raise BitLMError(f"optimizer.decay_steps must be at least 1, got {self.decay_steps}")
        decay = self.decay_steps or num_steps
        if not 0 <= self.warmup_steps < decay:
            raise BitLMError(
                f"optimizer.warmup_steps {self.warmup_steps} must be less than the schedule's {decay} steps "
                "(optimizer.decay_steps, or training.num_steps)"
            )
        if self.schedule == "wsd" and not 0 < (self.wsd_decay_steps or 0) <= decay:
            raise BitLMError(f"optimizer.wsd_decay_steps must lie in 1..{decay} with wsd, got {self.wsd_decay_steps}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise BitLMError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("epsilon", "weight_decay", "clip_grad", "head_learning_rate_multiplier"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BitLMError(f"optimizer.{name} must be finite and not negative, got {getattr(self, name)}")


def build_optimizer(
    config: OptimizerConfig,
    model_chunks: list,
    *,
    bf16: bool,
    use_distributed_optimizer: bool,
    overlap_param_gather: bool,
) -> MegatronOptimizer:
    """Megatron's Adam over DDP-wrapped chunks; the head's parameters are a group of their own.

    Collective over the world.
    """
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.learning_rate * config.min_learning_rate_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
    )
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            # A tied output layer is the first stage's embedding, and learns as that does.
            untied = ".output_layer." in f".{name}" and not getattr(parameter, "shared", False)
            setattr(parameter, HEAD_ATTRIBUTE, ".head." in f".{name}" or untied)
    head_rate = config.learning_rate * config.head_learning_rate_multiplier
    overrides = {
        **get_standard_config_overrides(megatron),
        # is_decoupled_lr is one of the four keys by which groups are matched on load.
        ParamKey(attr=HEAD_ATTRIBUTE): {
            "is_decoupled_lr": True,
            "max_lr": head_rate,
            "min_lr": head_rate * config.min_learning_rate_ratio,
        },
    }
    return get_megatron_optimizer(megatron, model_chunks, config_overrides=overrides)


def build_scheduler(config: OptimizerConfig, optimizer: MegatronOptimizer, num_steps: int) -> OptimizerParamScheduler:
    """Warm-up and decay in steps (one scheduler increment a step)."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=config.learning_rate * config.min_learning_rate_ratio,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=config.decay_steps or num_steps,
        lr_decay_style="WSD" if config.schedule == "wsd" else config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=config.wsd_decay_steps,
        lr_wsd_decay_style="cosine" if config.schedule == "wsd" else None,
    )


def backbone_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The current learning rate of the groups that are not the head's."""
    return next(group["lr"] for group in optimizer.param_groups if not group["is_decoupled_lr"])


def param_is_counted(parameter: torch.nn.Parameter) -> bool:
    """Whether a global norm counts the parameter on this rank: copies of others are counted where those are."""
    return param_is_not_tensor_parallel_duplicate(parameter) and param_is_not_shared(parameter)


def prepared_gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Hand the finished gradients to the optimizer and return their global norm, before clipping. Collective.

    With `update_weights` this is megatron-core's `optimizer.step()` in two, so that a step can be given up between.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def duplicated_gradients_norm(optimizer: MegatronOptimizer) -> float:
    """Norm of this rank's gradients that the global norm leaves out, as another tensor-parallel rank counts them."""
    gradients = [
        parameter.grad
        for parameter in _parameters(optimizer)
        if parameter.grad is not None and not param_is_counted(parameter)
    ]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def update_weights(optimizer: MegatronOptimizer, total_norm: float) -> None:
    """Clip the gradients, whose global norm is `total_norm`, and update the weights. Collective."""
    clip = optimizer.config.clip_grad
    if clip > 0:
        # By its module: on the CPU the function there is one that takes the CPU's tensors, too.
        clip_grads.clip_grad_by_total_norm_fp32(_parameters(optimizer), clip, total_norm)
    if not optimizer.step_with_ready_grads():
        raise RuntimeError("megatron-core did not update the weights, although all gradients are finite")


def _parameters(optimizer: MegatronOptimizer) -> list[torch.nn.Parameter]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [parameter for part in parts for parameter in part.get_parameters()]


@torch.no_grad()
def gradient_norms_by_part(optimizer: MegatronOptimizer, total_norm: float) -> dict[str, float]:
    """Gradient norms of backbone and head before clipping, from the gradients left by the last step.

    Collective over the optimizer's gradient-statistics group. `total_norm` is the global norm the step returned; it
    undoes the clipping.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and param_is_counted(parameter):
                    norm = torch.linalg.vector_norm(parameter.grad.float())
                    squares[int(group["is_decoupled_lr"])] += norm.double().square().cpu()
    squares = squares.to(torch.cuda.current_device()) if torch.cuda.is_available() else squares
    dist.all_reduce(squares, group=optimizer.get_grad_stats_parallel_group())
    clip = optimizer.config.clip_grad
    scale = max(1.0, (total_norm + 1e-6) / clip) if clip > 0 else 1.0
    backbone, head = (squares.sqrt() * scale).tolist()
    return {"gradient_norm/backbone": backbone, "gradient_norm/head": head}
