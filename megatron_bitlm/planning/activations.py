"""Bytes that a forward pass keeps for the backward pass, counted tensor by tensor.

The counts follow the code (they are compared with the storages that autograd really keeps): for each token
    layer      two inputs and two outputs of norms; query/key/value projection; query before its norm, where it is a
               copy; rotated query and key, value, attention output (once more where the batch is transposed); the
               SwiGLU's inner tensors; fp32 scales of the norms and the attention's log-sum-exp.
    head       a copy's layer keeps 20 widths, the modulations 6 a group and 2, y and the last norm 6 more.
    softmax    the input of its output layer, and all probabilities in fp32, which backward turns into gradients.
Shape legend: D hidden, F inner width, A query channels, P key/value channels, W head width, K bits, M slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bitlm.method.head import TIME_FEATURES, attention_head_dim, head_width
from megatron_bitlm.training.config import RunConfig

_FP32_BYTES, _INT64_BYTES = 4, 8
_HEAD_LAYER_WIDTHS = 20


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one micro-batch on one rank.

    input: kept by the input module. layer: kept by a transformer layer under the chosen recomputation. whole_layer:
    without any, which its backward pass brings back for a moment. layer_gradients: of a layer's tensors at the fullest
    moment. chunk: once a model chunk (rotary tables). boundary: hidden states at a chunk's end, which stay until the
    gradient returns. head: kept by head and loss. head_layer: by one of its layers without recomputation.
    head_gradients: of the head's tensors at the fullest moment.
    """

    input: float
    layer: float
    whole_layer: float
    layer_gradients: float
    chunk: float
    boundary: float
    head: float
    head_layer: float
    head_gradients: float


def activation_bytes(config: RunConfig, vocab_size: int, *, fused: bool) -> ActivationBytes:
    """Bytes kept of one micro-batch of a model for `vocab_size` ids.

    `fused` tells Transformer Engine's layers from the plain torch ones.
    """
    parallel, backbone = config.parallel, config.model.resolve_backbone()
    element = 2 if config.training.precision == "bf16" else 4
    tokens = config.training.micro_batch_size * config.data.sequence_length / parallel.context_parallel_size
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    inner, num_bits = config.model.input_hidden_size or 4 * backbone.hidden_size, (vocab_size - 1).bit_length()
    is_table = config.model.output == "softmax" or config.model.input == "embedding"
    lift = float(_INT64_BYTES) if is_table else (num_bits + 2.0 * inner) * element
    layer, whole = _layer(config, element, fused)
    if config.model.output == "softmax":
        head, head_layer, head_gradients = _softmax(config, vocab_size, element, shards)
    else:
        head, head_layer, head_gradients = (part / shards for part in _head(config, num_bits, element))
    return ActivationBytes(
        input=tokens * lift,
        layer=tokens * layer,
        whole_layer=tokens * whole,
        layer_gradients=tokens * _layer_gradients(config, element),
        chunk=tokens * backbone.head_dim * element,
        boundary=tokens * backbone.hidden_size * element / shards,
        head=tokens * head,
        head_layer=tokens * head_layer,
        head_gradients=tokens * head_gradients,
    )


def _layer(config: RunConfig, element: int, fused: bool) -> tuple[float, float]:
    """Bytes a token of a layer: kept, and without recomputation."""
    parallel, b = config.parallel, config.model.resolve_backbone()
    ranks = parallel.tensor_model_parallel_size
    shards = ranks if parallel.sequence_parallel else 1
    hidden = b.hidden_size * element / shards
    a, p = (heads * b.head_dim * element / ranks for heads in (b.num_attention_heads, b.num_query_groups))
    # Queries that share keys are copied out of the projection, unless the rank has a single group of them.
    copied = b.num_attention_heads != b.num_query_groups and b.num_query_groups > ranks
    transposed = config.training.micro_batch_size > 1
    scales = _FP32_BYTES * (2 / shards + (b.num_attention_heads + b.num_query_groups) / ranks)
    projection = a + 2 * p + (a if copied else 0)
    # Keys and values of the whole sequence, where context-parallel ranks gather them.
    gathered = 2 * p * (parallel.context_parallel_size - 1)
    log_sum_exp = _FP32_BYTES * b.num_attention_heads / ranks
    attention = 2 * a + 2 * p + (a if transposed else 0) + gathered + log_sum_exp
    mlp = (3 if fused else 5) * b.ffn_hidden_size * element / ranks
    whole = 4 * hidden + scales + projection + attention + mlp
    if parallel.recompute == "full" and parallel.recompute_method == "uniform":
        return hidden / parallel.recompute_num_layers, whole
    if parallel.recompute != "selective":
        return whole, whole
    kept = whole
    if "core_attn" in parallel.recompute_modules:
        kept += 2 * a + p - attention
    if "mlp" in parallel.recompute_modules:
        kept -= mlp
    if "layernorm" in parallel.recompute_modules and not fused:
        kept -= 2 * hidden + 2 * _FP32_BYTES / shards
    return kept, whole


def _layer_gradients(config: RunConfig, element: int) -> float:
    """Bytes a token at the fullest moment: gradients of the SwiGLU's two halves and of two hidden states.

    Sequence parallelism gathers a layer's input once more, whole, into a buffer.
    """
    parallel, b = config.parallel, config.model.resolve_backbone()
    ranks = parallel.tensor_model_parallel_size
    shards = ranks if parallel.sequence_parallel else 1
    gathered = b.hidden_size * element if shards > 1 else 0
    return 2.0 * b.ffn_hidden_size * element / ranks + 2.0 * b.hidden_size * element / shards + gathered


def _head(config: RunConfig, num_bits: int, element: int) -> tuple[float, float, float]:
    """Bytes a token of head and loss: kept, of one layer, and of the gradients inside a layer."""
    head, hidden = config.model.head, config.model.resolve_backbone().hidden_size
    copies, width = config.objective.samples_per_block, head_width(head, hidden)
    layer = _HEAD_LAYER_WIDTHS * width * element + _FP32_BYTES * (4 + width / attention_head_dim(head, width))
    modulations = (6 * head.num_modulation_groups + 2) * width * element  # one tensor, kept whole
    gradients = 6 if head.activation_checkpointing else 2  # a checkpointed layer's modulation gradient comes at once
    kept_layer = width * element if head.activation_checkpointing else layer
    ends = (2 + 4) * width * element + 2 * _FP32_BYTES  # y before and after its SiLU; the last norm and its modulation
    time = (TIME_FEATURES + 2 * width) * element / config.model.block_size
    bits = num_bits * (element + 2 * _FP32_BYTES)  # input; clean estimate and its error
    copy = head.num_layers * kept_layer + modulations + ends + time + bits
    final_norm = hidden * element + _FP32_BYTES
    return copies * copy + hidden * element + final_norm, copies * layer, copies * gradients * width * element


def _softmax(config: RunConfig, vocab_size: int, element: int, shards: int) -> tuple[float, float, float]:
    """Bytes a token of final norm, output layer and cross-entropy: kept, none, and the gradient of bf16 logits.

    Target mask and place are 9 bytes, whether the token is counted 1. Logits in fp32 are turned into probabilities, and
    these into the gradient, in place.
    """
    parallel, hidden = config.parallel, config.model.resolve_backbone().hidden_size
    rows = config.model.softmax.padded_vocab_size(vocab_size, parallel.tensor_model_parallel_size)
    rows //= parallel.tensor_model_parallel_size
    states = (2 * hidden * element + _FP32_BYTES) / shards  # in and out of the final norm
    kept = states + rows * _FP32_BYTES + 1 + _INT64_BYTES + 1
    return kept, 0.0, float(rows * element if element < _FP32_BYTES else 0)
