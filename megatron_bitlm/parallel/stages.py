"""Which pipeline rank holds how many layers, by megatron-core's own rules."""

from __future__ import annotations

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_bitlm.parallel.config import ParallelConfig


def layers_by_rank(parallel: ParallelConfig, num_layers: int) -> list[list[int]]:
    """Layers of every model chunk, by pipeline rank; the layout must have been validated against the model.

    The first chunk of the first rank also holds the input, the last chunk of the last rank the head.
    """
    size, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if parallel.pipeline_model_parallel_layout is not None:
        layout = PipelineParallelLayerLayout(parallel.pipeline_model_parallel_layout, size)
        return [[chunk.count(LayerType.decoder) for chunk in rank] for rank in layout.layout]
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    ranks: list[int | None] = [None] * size
    if first is not None:
        ranks[0] = first
    if last is not None:
        ranks[-1] = last
    shared = num_layers - sum(count for count in ranks if count is not None)
    even = shared // max(1, ranks.count(None))
    return [[(even if count is None else count) // chunks] * chunks for count in ranks]
