"""Configuration of a BitLM for transformers (arXiv 2605.11577)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class BitLMConfig(PreTrainedConfig):
    """Shape and settings of a BitLM; the backbone's names are those of Qwen3.

    Args:
        vocab_size: V; codes have ceil(log2 V) bits.
        block_size: m, tokens denoised jointly.
        has_code_map: Whether a permutation of the ids is stored with the weights.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
            rms_norm_eps, rope_theta, max_position_embeddings: Of the backbone.
        input: `mlp` on codes or `embedding`, a table by id.
        input_hidden_size: Hidden width of the code MLP.
        head: Settings of the diffusion head (`HeadConfig`).
        objective: Settings of the training loss (`ObjectiveConfig`).
        seed: Keys the noise of the training loss.
        sampler: Defaults of `generate` (`SamplerConfig`).
        entropy_profile: `edges` and `weights` of the measured entropy rate over log-SNR, for the entropy grid and the
            noise gate; None is that of independent bits.
        kwargs: What transformers keeps, such as bos_token_id and eos_token_id, the ids that frame documents.
    """

    model_type = "bitlm"
    has_no_defaults_at_init = True

    def __init__(
        self,
        vocab_size: int = 258,
        block_size: int = 4,
        has_code_map: bool = False,
        hidden_size: int = 192,
        intermediate_size: int = 512,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 64,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        max_position_embeddings: int = 16384,
        input: str = "mlp",
        input_hidden_size: int = 768,
        head: dict[str, Any] | None = None,
        objective: dict[str, Any] | None = None,
        seed: int = 0,
        sampler: dict[str, Any] | None = None,
        entropy_profile: dict[str, list[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.block_size, self.has_code_map = vocab_size, block_size, has_code_map
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.head_dim = num_hidden_layers, head_dim
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.rms_norm_eps, self.rope_theta = rms_norm_eps, rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.input, self.input_hidden_size = input, input_hidden_size
        self.head, self.objective, self.seed, self.sampler = head or {}, objective or {}, seed, sampler or {}
        self.entropy_profile = entropy_profile
        super().__init__(**{"tie_word_embeddings": False} | kwargs)
