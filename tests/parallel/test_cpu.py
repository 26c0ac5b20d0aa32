"""megatron-core believes the CPU is CUDA, and nobody else does."""

import pickle

import pytest
import torch

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.cpu import install_cpu_support

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU support is for machines without CUDA")


@pytest.fixture(autouse=True)
def installed():
    install_cpu_support()


def test_torch_itself_is_untouched():
    from megatron.core import utils

    assert utils.torch is not torch
    assert utils.torch.nn is torch.nn and utils.torch.Tensor is torch.Tensor
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert "type" not in vars(torch.Tensor) and "cuda" not in vars(torch.Tensor)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
    assert pickle.loads(pickle.dumps(torch.zeros)) is torch.zeros


def test_megatrons_torch_reads_cuda_as_the_cpu():
    from megatron.core.pipeline_parallel import schedules

    theirs = schedules.torch
    assert theirs.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert theirs.empty_like(torch.ones(2), device=torch.device("cuda", 0)).device.type == "cpu"
    assert theirs.ones(2, device=theirs.cuda.current_device()).device.type == "cpu"
    assert theirs.ones(2, device="meta").device.type == "meta"
    assert theirs.cuda.device_count() == 1
    theirs.cuda.synchronize()
    # Attributes that torch makes on first use are found as well.
    assert theirs._dynamo is torch._dynamo


def test_generator_states_are_forked_from_the_cpu_generator():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 5)
    torch.manual_seed(1)
    plain = torch.rand(4)
    torch.manual_seed(1)
    with tracker.fork("one"):
        first = torch.rand(4)
    assert torch.equal(torch.rand(4), plain)
    with tracker.fork("one"):
        second = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(8), torch.cat([first, second]))


def test_installing_twice_changes_nothing():
    from megatron.core.optimizer import clip_grads

    before = clip_grads.clip_grad_by_total_norm_fp32
    install_cpu_support()
    assert clip_grads.clip_grad_by_total_norm_fp32 is before


def test_it_refuses_to_hide_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BitLMError, match="must not be installed where CUDA is available"):
        install_cpu_support.__wrapped__()
