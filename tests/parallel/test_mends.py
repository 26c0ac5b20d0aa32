"""Save, load and go on equals going on, with torch's Adam inside megatron-core's distributed optimizer."""

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer

from megatron_bitlm.model.backbone import Backbone, block_spec, transformer_config
from megatron_bitlm.model.initialization import initialize_parameters
from megatron_bitlm.model.inputs import CodeMLP
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.model.presets import BackboneConfig
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel

pytestmark = pytest.mark.skipif(distrib_optimizer.HAVE_APEX_OR_TE, reason="the mends are for torch's Adam")
SHAPE = BackboneConfig(1, 16, 32, 2, 1, head_dim=8)


@pytest.fixture(scope="module", autouse=True)
def single_process():
    yield initialize_parallel(ParallelConfig(), seed=0)
    shutdown_parallel()


class Run:
    """A model and its optimizer; steps on a fixed sequence of batches."""

    def __init__(self, precision: str) -> None:
        config = transformer_config(SHAPE, ParallelConfig(), precision=precision)
        self.backbone = Backbone(
            config,
            block_spec(config, block_size=4),
            backbone=SHAPE,
            input_module=CodeMLP(5, 16, SHAPE.hidden_size, dtype=config.params_dtype),
        )
        initialize_parameters(self.backbone, seed=1)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(config, ddp, self.backbone)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            clip_grad=0.5,
            use_distributed_optimizer=True,
            bf16=precision == "bf16",
            params_dtype=config.params_dtype,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }

    def step(self, seed: int) -> float:
        self.model.zero_grad_buffer()
        codes = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(seed)).sign()
        hidden = self.model(codes, SequenceLayout.from_batch(None, 2, 16, 4))
        (hidden.float() - 1).square().sum().backward()
        finalize_model_grads([self.model], num_tokens=torch.tensor(32))
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        return norm

    def sharded(self, is_loading: bool) -> dict:
        state = {"model": self.backbone.sharded_state_dict(metadata=self.metadata)}
        optimizer = self.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=self.metadata)
        return {**state, "optimizer": optimizer}

    def save(self, path: str) -> None:
        dist_checkpointing.save(self.sharded(False), path, content_metadata={})

    def load(self, path: str) -> None:
        loaded = dist_checkpointing.load(self.sharded(True), path)
        self.backbone.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_steps_before", [0, 3])
def test_resuming_is_going_on(tmp_path, precision, num_steps_before):
    run = Run(precision)
    for seed in range(num_steps_before):
        run.step(seed)
    run.save(str(tmp_path))
    resumed = Run(precision)
    with torch.no_grad():
        for parameter in resumed.backbone.parameters():
            parameter.zero_()
    resumed.load(str(tmp_path))
    for seed in range(10, 13):
        assert run.step(seed) == resumed.step(seed)
    for (name, ours), theirs in zip(run.backbone.named_parameters(), resumed.backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_no_two_parameters_share_a_step_count(tmp_path):
    run = Run("fp32")
    run.step(0)
    run.save(str(tmp_path))
    resumed = Run("fp32")
    resumed.load(str(tmp_path))
    resumed.step(1)
    states = list(resumed.optimizer.chained_optimizers[0].optimizer.state.values())
    assert len({id(state["step"]) for state in states}) == len(states) > 4
    assert {state["step"].item() for state in states} == {2.0}


def test_the_gradient_is_clipped_to_the_norm():
    run = Run("fp32")
    norm = run.step(0)
    assert norm > 0.5
    total = sum(p.main_grad.double().square().sum() for p in run.backbone.parameters())
    assert total.sqrt().item() == pytest.approx(0.5, rel=1e-4)
