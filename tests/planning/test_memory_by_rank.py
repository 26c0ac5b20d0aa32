"""Kept activations on the ranks of a layout, against those of autograd on real ranks."""

import pytest

from megatron_bitlm.planning.activations import activation_bytes
from megatron_bitlm.planning.memory import memory_by_rank
from megatron_bitlm.planning.parameters import parameter_sizes
from tests.distributed_harness import run_ranks
from tests.planning.models import VOCAB_SIZE, as_softmax, kept_bytes, small_run

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "context": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("output", ["diffusion", "softmax"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_kept_activations_of_a_rank(name, output):
    config = small_run(**LAYOUTS[name])
    config = as_softmax(config) if output == "softmax" else config
    sizes = parameter_sizes(config.model, VOCAB_SIZE, config.parallel.tensor_model_parallel_size)
    (memory,) = memory_by_rank(config, sizes, activation_bytes(config, VOCAB_SIZE, fused=False), 2)
    for kept in run_ranks(kept_bytes, 2, config, timeout_s=60):
        assert memory.activations + memory.head_activations == pytest.approx(kept, rel=0.01), kept
