"""Settings of the small FP8 runs: every size a multiple of 16, and a layer in FP8 between two in bf16."""

from typing import Any

FP8_RUN: dict[str, Any] = {
    "training__precision": "bf16",
    "model__implementation": "transformer_engine",
    "model__backbone__num_layers": 4,
    "model__backbone__hidden_size": 64,
    "model__backbone__ffn_hidden_size": 128,
    "model__backbone__num_attention_heads": 2,
    "model__backbone__head_dim": 32,
    "model__head__width": 64,
    "model__head__head_dim": 32,
}
RECIPES: dict[str, dict[str, Any]] = {
    "tensorwise": {},
    "blockwise": {},
    "delayed": {"training__fp8__num_bf16_layers_at_start": 0, "training__fp8__num_bf16_layers_at_end": 0},
}


def fp8_overrides(recipe: str, **changes: Any) -> dict[str, Any]:
    """Overrides of `training_runs.train` for a run in FP8."""
    return {**FP8_RUN, "training__fp8__recipe": recipe, **RECIPES[recipe], **changes}
