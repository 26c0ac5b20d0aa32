"""transformers' Qwen3 with the weights of our backbone: the independent reference."""

import torch
from transformers import Qwen3Config, Qwen3Model

from megatron_bitlm.model.presets import BackboneConfig


def qwen3_from_backbone(backbone: BackboneConfig, state: dict[str, torch.Tensor]) -> Qwen3Model:
    """A Qwen3Model of the same shape, filled from `Backbone.state_dict()` of one process."""
    config = Qwen3Config(
        vocab_size=2,
        hidden_size=backbone.hidden_size,
        intermediate_size=backbone.ffn_hidden_size,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_attention_heads,
        num_key_value_heads=backbone.num_query_groups,
        head_dim=backbone.head_dim,
        rms_norm_eps=backbone.norm_epsilon,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": backbone.rope_theta},
        attn_implementation="sdpa",
        use_cache=False,
    )
    dtype = state["decoder.final_layernorm.weight"].dtype
    model = Qwen3Model(config).to(dtype)
    if dtype == torch.float64:
        _widen_norms(model)
    missing, unexpected = model.load_state_dict(_renamed(backbone, state), strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected
    return model


def _widen_norms(model: torch.nn.Module) -> None:
    """transformers' norms round to fp32 on the way; torch's keep float64."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen3RMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, norm)


def _renamed(backbone: BackboneConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {"norm.weight": state["decoder.final_layernorm.weight"]}
    for layer in range(backbone.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"layers.{layer}."
        query, key, value = split_qkv(backbone, state[ours + "self_attention.linear_qkv.weight"])
        gate, up = state[ours + "mlp.linear_fc1.weight"].chunk(2)
        renamed |= {
            theirs + "self_attn.q_proj.weight": query,
            theirs + "self_attn.k_proj.weight": key,
            theirs + "self_attn.v_proj.weight": value,
            theirs + "self_attn.o_proj.weight": state[ours + "self_attention.linear_proj.weight"],
            theirs + "self_attn.q_norm.weight": state[ours + "self_attention.q_layernorm.weight"],
            theirs + "self_attn.k_norm.weight": state[ours + "self_attention.k_layernorm.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "mlp.linear_fc2.weight"],
            theirs + "input_layernorm.weight": state[ours + "input_layernorm.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "pre_mlp_layernorm.weight"],
        }
    return renamed


def split_qkv(backbone: BackboneConfig, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fused weight, per query group its queries, key and value, as three weights."""
    heads = backbone.num_attention_heads // backbone.num_query_groups
    grouped = weight.view(backbone.num_query_groups, heads + 2, backbone.head_dim, -1)
    parts = grouped.split([heads, 1, 1], dim=1)
    return tuple(part.flatten(0, 2) for part in parts)


def block_causal_bias(positions: torch.Tensor, documents: torch.Tensor, block_size: int) -> torch.Tensor:
    """Eq. 16 as an additive mask [B, 1, S, S], written out pair by pair."""
    size = positions.shape[1]
    bias = torch.full((positions.shape[0], 1, size, size), -torch.inf, dtype=torch.float64)
    for row in range(positions.shape[0]):
        for query in range(size):
            for key in range(size):
                same_document = documents[row, query] == documents[row, key]
                if same_document and positions[row, key] // block_size <= positions[row, query] // block_size:
                    bias[row, 0, query, key] = 0.0
    return bias
