"""Combinations that cannot train are refused by the entry point before a process group or a file exists."""

import pytest
import torch.distributed as dist

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.training.trainer import pretrain
from tests.training_runs import corpus, make_dataset, run_config

CONTEXT = {"parallel__context_parallel_size": 2}
PIPELINE = {"parallel__pipeline_model_parallel_size": 2}
REFUSED = {
    "chunks cut blocks": ({**CONTEXT, "data__sequence_length": 72}, "a multiple of 2 x 2 x 4 = 16, got 72"),
    "chunks cut large blocks": (
        {
            **CONTEXT,
            "parallel__tensor_model_parallel_size": 2,
            "parallel__sequence_parallel": True,
            "model__block_size": 16,
            "data__sequence_length": 96,
        },
        "a multiple of 2 x 2 x 16 = 64, got 96",
    ),
    "flex": (
        {**CONTEXT, "model__attention_backend": "flex"},
        "attention_backend is flex, which cannot attend from one",
    ),
    "rounds of virtual stages": (
        {
            **PIPELINE,
            "parallel__virtual_pipeline_model_parallel_size": 2,
            "model__backbone__num_layers": 4,
            "training__global_batch_size": 12,
        },
        "in rounds of 2, but a step has 3 a data-parallel rank",
    ),
    "layers": ({**PIPELINE, "model__backbone__num_layers": 3}, "3 layers cannot be spread over 2 pipeline stages"),
    "heads": (
        {"parallel__tensor_model_parallel_size": 4},
        "is 4, which does not divide the model's num_attention_heads",
    ),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), "docs", corpus(8))


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_cannot_train_is_refused_before_anything_starts(name, prefix, tmp_path, monkeypatch):
    overrides, message = REFUSED[name]
    config = run_config(tmp_path / "run", prefix, **overrides)
    world_size = config.parallel.model_parallel_size
    for variable, value in {"RANK": 0, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(variable, str(value))
    with pytest.raises(BitLMError, match=message):
        pretrain(config)
    assert not dist.is_initialized()
    assert not (tmp_path / "run").exists()
