"""Parameters by part and by rank, counted without storage.

Shape legend: L layers, D hidden, F inner width, A query channels, P key/value channels, C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import DiffusionHead
from megatron_bitlm.model.build import ModelConfig, build_input
from megatron_bitlm.model.presets import BackboneConfig


@dataclass(frozen=True)
class ParameterSizes:
    """Elements of every parameter that one tensor-parallel rank holds, by part.

    layer: of one transformer layer; norm: the final norm; input, head: a BitLM's are replicated over tensor-parallel
    ranks, a softmax's tables shared; tied_copy: the last stage's copy of a tied table, where that is not the first.
    """

    num_layers: int
    input: tuple[int, ...]
    layer: tuple[int, ...]
    norm: tuple[int, ...]
    head: tuple[int, ...]
    tied_copy: tuple[int, ...] = ()

    def of_chunk(self, num_layers: int, *, first: bool, last: bool) -> list[int]:
        """The parameters of a pipeline chunk of `num_layers` layers, in the model's order."""
        sizes = [*(self.input if first else ()), *(self.layer * num_layers)]
        return sizes + ([*self.norm, *self.head, *(() if first else self.tied_copy)] if last else [])

    def counts(self) -> dict[str, int]:
        """Parameters of `backbone` (with its final norm), `input` and `head`."""
        backbone = self.num_layers * sum(self.layer) + sum(self.norm)
        return {"backbone": backbone, "input": sum(self.input), "head": sum(self.head)}


def parameter_sizes(config: ModelConfig, vocab_size: int, tensor_parallel_size: int = 1) -> ParameterSizes:
    """The parameters of a model for a vocabulary of `vocab_size` ids."""
    backbone = config.resolve_backbone()
    if config.output == "softmax":
        rows = config.softmax.padded_vocab_size(vocab_size, tensor_parallel_size) // tensor_parallel_size
        table, tied = (rows * backbone.hidden_size,), config.softmax.tie_embeddings
        return ParameterSizes(
            num_layers=backbone.num_layers,
            input=table,
            layer=_layer(backbone, tensor_parallel_size),
            norm=(backbone.hidden_size,),
            head=() if tied else table,
            tied_copy=table if tied else (),
        )
    code = BinaryCode(vocab_size)
    with torch.device("meta"):
        lift = build_input(config, code, backbone.hidden_size, torch.float32)
        head = DiffusionHead(
            config.head,
            num_bits=code.num_bits,
            block_size=config.block_size,
            condition_size=backbone.hidden_size,
        )
    return ParameterSizes(
        num_layers=backbone.num_layers,
        input=tuple(parameter.numel() for parameter in lift.parameters()),
        layer=_layer(backbone, tensor_parallel_size),
        norm=(backbone.hidden_size,),
        head=tuple(parameter.numel() for parameter in head.parameters()),
    )


def _layer(b: BackboneConfig, ranks: int) -> tuple[int, ...]:
    """Two norms, query/key/value projection, query and key norms, output projection, gate and up, down."""
    d, c = b.hidden_size, b.head_dim
    a, p, f = b.num_attention_heads * c // ranks, b.num_query_groups * c // ranks, b.ffn_hidden_size // ranks
    return (d, a * d, (a + 2 * p) * d, c, c, d, 2 * f * d, f * d)
