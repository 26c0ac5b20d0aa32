"""Starting a run from the weights of another: a pretrained checkpoint, or a model that was imported."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.head import attention_head_dim, head_width
from megatron_bitlm.model.build import ModelConfig, model_config
from megatron_bitlm.model.checkpoint import find_checkpoint, load_model, read_meta
from megatron_bitlm.training.checkpoint import agreed_damage
from megatron_bitlm.training.config import RunConfig

_NOT_OF_THE_WEIGHTS = ("preset", "adaln_init_std", "activation_checkpointing")


def check_initial_checkpoint(config: RunConfig) -> dict[str, Any] | None:
    """meta.json of the checkpoint that `run.initial_checkpoint` names, after comparing its model with the run's.

    Raises:
        BitLMError: No such checkpoint, or one of another model (names the first setting that differs).
    """
    if config.run.initial_checkpoint is None:
        return None
    path = _find(config.run.initial_checkpoint)
    meta = read_meta(path)
    stored, here = (_shape(model) for model in (model_config(meta["settings"]), config.model))
    for name, value in here.items():
        if stored[name] != value:
            raise BitLMError(
                f"run.initial_checkpoint {path} has model.{name} {stored[name]!r}, but the run has {value!r}; a "
                "run can start only from weights of its own model"
            )
    return meta


def load_initial_weights(config: RunConfig, chunks: list, optimizer: Any) -> Path | None:
    """Load the weights that `run.initial_checkpoint` names into a run at its first step; None without any. Collective.

    Args:
        config: The run.
        chunks: Unwrapped model chunks of this rank.
        optimizer: megatron-core's, whose fp32 copies of the weights follow.

    Raises:
        BitLMError: A damaged checkpoint.
    """
    if config.run.initial_checkpoint is None:
        return None
    path = _find(config.run.initial_checkpoint)
    damage = agreed_damage(path)
    if damage is not None:
        raise BitLMError(f"run.initial_checkpoint: {damage}")
    load_model(path, chunks)
    optimizer.reload_model_params()
    return path


def _find(path: str) -> Path:
    try:
        return find_checkpoint(path)
    except BitLMError as error:
        raise BitLMError(f"run.initial_checkpoint: {error}") from error


def _shape(model: ModelConfig) -> dict[str, Any]:
    """What decides which tensors a model has and what they mean, with defaults filled in."""
    backbone = model.resolve_backbone()
    shape = {f"backbone.{name}": value for name, value in asdict(backbone).items() if name != "init_std"}
    shape |= {"output": model.output, "block_size": model.block_size}
    if model.output == "softmax":
        return shape | {f"softmax.{name}": value for name, value in asdict(model.softmax).items()}
    head = asdict(model.head) | {"width": head_width(model.head, backbone.hidden_size)}
    head["head_dim"] = attention_head_dim(model.head, head["width"])
    shape |= {f"head.{name}": value for name, value in head.items() if name not in _NOT_OF_THE_WEIGHTS}
    return shape | {
        "input": model.input,
        "input_hidden_size": model.input_hidden_size or 4 * backbone.hidden_size,
    }
