"""Which tensor of a Hugging Face folder is which part of a training checkpoint.

A checkpoint stacks the layers and fuses what one product computes: queries, keys and values by query group, gate above
up. A Hugging Face folder has each alone. One table serves both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_bitlm.model.presets import BackboneConfig


@dataclass(frozen=True)
class Part:
    """Where a Hugging Face tensor lies in a checkpoint.

    Attributes:
        key: Tensor of the checkpoint.
        layer: Its part along the first dim, or None for a tensor that is not stacked.
        rows: Row ranges of that part that follow each other in the Hugging Face tensor, or None for all rows.
    """

    key: str
    layer: int | None = None
    rows: tuple[tuple[int, int], ...] | None = None


# Hugging Face name in a layer: checkpoint name in "decoder.layers."; the same tensor in both.
_SAME = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}


def backbone_parts(backbone: BackboneConfig) -> Iterator[tuple[str, Part]]:
    """(Hugging Face name, part of the checkpoint) of every tensor of the backbone, layer by layer."""
    dim, queries = backbone.head_dim, backbone.num_attention_heads // backbone.num_query_groups
    group = (queries + 2) * dim
    starts = [number * group for number in range(backbone.num_query_groups)]
    fused = {
        "self_attn.q_proj.weight": tuple((start, start + queries * dim) for start in starts),
        "self_attn.k_proj.weight": tuple((start + queries * dim, start + (queries + 1) * dim) for start in starts),
        "self_attn.v_proj.weight": tuple((start + (queries + 1) * dim, start + group) for start in starts),
    }
    width = backbone.ffn_hidden_size
    for layer in range(backbone.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows in fused.items():
            yield prefix + name, Part("decoder.layers.self_attention.linear_qkv.weight", layer, rows)
        for name, rows in (("gate", (0, width)), ("up", (width, 2 * width))):
            yield f"{prefix}mlp.{name}_proj.weight", Part("decoder.layers.mlp.linear_fc1.weight", layer, (rows,))
        for name, key in _SAME.items():
            yield prefix + name, Part(f"decoder.layers.{key}", layer)
    yield "model.norm.weight", Part("decoder.final_layernorm.weight")


def module_parts(names: list[str]) -> Iterator[tuple[str, Part]]:
    """Parts of modules that both sides hold under the same names: input and head."""
    for name in names:
        yield name, Part(name)
