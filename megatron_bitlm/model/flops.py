"""FLOPs of a training token, by part of the model.

A multiply-add counts two. Attention counts only the keys that a query sees (causal halves), recomputed activations
count nothing: what the model needs, not what a machine spends.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bitlm.method.head import TIME_FEATURES, head_width
from megatron_bitlm.model.build import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """Forward and backward FLOPs of one training token.

    input: code MLP; matrices: those of the transformer layers; attention: scores and weighted values; head: all noisy
    copies of the token, or the softmax's output layer.
    """

    input: float
    matrices: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.input + self.matrices + self.attention + self.head


def mean_visible_keys(sequence_length: int, block_size: int) -> float:
    """Average keys a query sees when a sample is one document: (S + m) / 2. Packed documents see fewer."""
    return (sequence_length + block_size) / 2


def token_flops(config: ModelConfig, vocab_size: int, samples_per_block: int, visible_keys: float) -> TokenFlops:
    """FLOPs of a token of a model for `vocab_size` ids.

    A weight costs 2 forward, and 2 each for its own gradient and its input's; the first layer of a chain has no input
    gradient. Attention costs 12 c H_d L with c mean visible keys.
    """
    b, num_bits = config.resolve_backbone(), (vocab_size - 1).bit_length()
    inner = config.input_hidden_size or 4 * b.hidden_size
    lift = 4.0 * num_bits * inner + 6.0 * inner * b.hidden_size
    if config.output == "softmax":
        lift, head = 0.0, 6.0 * vocab_size * b.hidden_size  # the rows that pad the table are not needed
    else:
        lift, head = 0.0 if config.input == "embedding" else lift, head_flops(config, num_bits, samples_per_block)
    return TokenFlops(
        input=lift,
        matrices=6.0 * b.num_matrix_parameters,
        attention=12.0 * visible_keys * b.head_dim * b.num_attention_heads * b.num_layers,
        head=head,
    )


def head_flops(config: ModelConfig, num_bits: int, samples_per_block: int) -> float:
    """Of the head, for a token: r copies of the blocks and their modulation, and the condition once."""
    head, m, d = config.head, config.block_size, config.resolve_backbone().hidden_size
    w = head_width(head, d)
    layer = 4 * w * w + 3 * w * (3 * w // 2)  # attention's four projections and a SwiGLU of hidden 1.5 w
    slot_attention = 12.0 * m * w
    modulation = (6 * head.num_modulation_groups + 2) * w * w
    time = (4.0 * TIME_FEATURES * w + 6.0 * w * w) / m  # one time a block
    bits = 4.0 * num_bits * w + 6.0 * w * num_bits
    copy = head.num_layers * (6.0 * layer + slot_attention) + 6.0 * modulation + time + bits
    condition = 6.0 * d * w * (m + 1 if head.conditioning == "mix" else 1)
    return samples_per_block * copy + condition
