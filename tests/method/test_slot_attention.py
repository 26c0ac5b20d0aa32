"""Attention of a block's slots, through PyTorch on CPU and through Triton on CUDA."""

import importlib.util

import pytest
import torch

from megatron_bitlm.method.head import DiffusionHead, HeadConfig
from megatron_bitlm.method.slot_attention import fused_slot_obstacle, slot_attention

CUDA = torch.device("cuda")


def plainly(qkv, num_heads):
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
    weights = (torch.einsum("nihd,njhd->nhij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("nhij,njhd->nihd", weights, v).flatten(2)


def values(attend, qkv, num_heads, grad_out):
    qkv = qkv.clone().requires_grad_()
    out = attend(qkv, num_heads)
    return out.detach(), torch.autograd.grad(out, qkv, grad_out)[0]


def inputs(num_blocks, num_slots, num_heads, head_dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    width = num_heads * head_dim
    shapes = (num_blocks, num_slots, 3 * width), (num_blocks, num_slots, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("shape", [(5, 4, 2, 16), (3, 1, 2, 8), (2, 9, 1, 24)])
def test_equals_plain_attention(shape):
    qkv, grad_out = inputs(*shape)
    pairs = zip(values(slot_attention, qkv, shape[2], grad_out), values(plainly, qkv, shape[2], grad_out), strict=True)
    assert all((one - other).abs().max() < 1e-12 for one, other in pairs)


def test_where_the_fused_kernel_runs(monkeypatch):
    assert "for CUDA" in fused_slot_obstacle(torch.device("cpu"), torch.float32, 4)
    assert "not torch.float64" in fused_slot_obstacle(CUDA, torch.float64, 4)
    assert "up to 64 slots, not 65" in fused_slot_obstacle(CUDA, torch.bfloat16, 65)
    found = {"triton"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object() if name in found else None)
    assert "exported model" in fused_slot_obstacle(CUDA, torch.bfloat16, 4)
    found.clear()
    assert "Triton is not installed" in fused_slot_obstacle(CUDA, torch.bfloat16, 4)
    found |= {"triton", ".slot_attention_triton"}
    assert fused_slot_obstacle(CUDA, torch.bfloat16, 4) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(
    "shape", [(1000, 4, 8, 128), (77, 16, 2, 64), (33, 64, 2, 128), (50, 3, 1, 24), (9, 1, 2, 128)]
)
def test_fused_kernel_equals_plain_attention(shape, dtype, tolerance):
    assert fused_slot_obstacle(CUDA, dtype, shape[1]) is None
    qkv, grad_out = (x.to(CUDA) for x in inputs(*shape, dtype))
    found = values(slot_attention, qkv, shape[2], grad_out)
    expected = values(plainly, qkv.double(), shape[2], grad_out.double())
    for one, other in zip(found, expected, strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() < tolerance


@pytest.mark.gpu
def test_head_is_the_same_on_both_devices():
    torch.manual_seed(0)
    head = DiffusionHead(HeadConfig(width=256, adaln_init_std=0.05), num_bits=18, block_size=4, condition_size=64)
    torch.nn.init.normal_(head.output.weight, std=0.1)
    noisy, time, condition = torch.randn(2, 9, 4, 18), torch.rand(2, 9), torch.randn(9, 4, 64)
    results = []
    for device in ("cpu", "cuda"):
        head.to(device).zero_grad()
        out = head(noisy.to(device), time.to(device), condition.to(device))
        out.square().mean().backward()
        results.append([out.detach().cpu(), *(p.grad.cpu() for p in head.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
