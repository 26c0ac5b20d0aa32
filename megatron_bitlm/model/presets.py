"""Backbone sizes: Qwen3's four dense models and a tiny one for a laptop."""

from dataclasses import dataclass

from megatron_bitlm.errors import BitLMError


@dataclass
class BackboneConfig:
    """Shape of a Qwen3 backbone (BitLM section 4: no embedding table and no softmax).

    Attributes:
        num_layers: transformer layers L.
        hidden_size: width d of the hidden states.
        ffn_hidden_size: inner width of the SwiGLU.
        num_attention_heads: query heads.
        num_query_groups: key/value heads, which divide the query heads.
        head_dim: channels of a head; independent of `hidden_size / num_attention_heads`.
        rope_theta: base of the rotary frequencies.
        norm_epsilon: epsilon of every RMSNorm.
        init_std: standard deviation of the initial weights; output projections get it over sqrt(2 L).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int = 128
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6
    init_std: float = 0.02

    def validate(self) -> None:
        """Checks that the sizes fit together.

        Raises:
            BitLMError: names the setting and its value.
        """
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise BitLMError(f"backbone.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_query_groups:
            raise BitLMError(
                f"backbone.num_query_groups is {self.num_query_groups}, which does not divide "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise BitLMError(
                f"backbone.head_dim is {self.head_dim}; rotary embeddings turn pairs of channels, so it must be even"
            )

    @property
    def num_matrix_parameters(self) -> int:
        """Weights in matrices, L (2 d a + 2 d a_kv + 3 d f); each costs a training token 6 FLOPs."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_query_groups * self.head_dim
        return self.num_layers * self.hidden_size * (2 * queries + 2 * keys + 3 * self.ffn_hidden_size)

    @property
    def num_parameters(self) -> int:
        """All parameters: matrices and norms (of layer inputs, queries, keys and the output)."""
        norms = self.num_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
        return self.num_matrix_parameters + norms


# name: (layers, d, ffn, heads, key/value heads, head_dim)
_PRESETS = {
    "tiny": (4, 192, 512, 4, 2, 64),
    "0.6B": (28, 1024, 3072, 16, 8, 128),
    "1.7B": (28, 2048, 6144, 16, 8, 128),
    "4B": (36, 2560, 9728, 32, 8, 128),
    "8B": (36, 4096, 12288, 32, 8, 128),
}


def backbone_preset(name: str) -> BackboneConfig:
    """The backbone called `name`: tiny, 0.6B, 1.7B, 4B or 8B.

    Raises:
        BitLMError: an unknown name.
    """
    if name not in _PRESETS:
        raise BitLMError(f"there is no model preset {name!r}; choose one of {', '.join(_PRESETS)}")
    return BackboneConfig(*_PRESETS[name])
