"""What a run leaves in the process it ran in."""

import gc

from megatron_bitlm.model.backbone import Backbone
from megatron_bitlm.parallel.state import ProcessGroupCollection
from tests.training_runs import train


def left_over() -> list[object]:
    gc.collect()
    return [kept for kept in gc.get_objects() if type(kept) is ProcessGroupCollection or isinstance(kept, Backbone)]


def test_models_and_process_groups_end_with_the_run(tmp_path, dataset):
    before = len(left_over())
    train(tmp_path / "run", dataset, training__num_steps=4, parallel__use_distributed_optimizer=True)
    assert len(left_over()) == before
