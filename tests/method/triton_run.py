"""The fused in-block kernels in Triton's interpreter, or compiled for GPUs that need not be here; prints JSON.

Run in a process of its own: the interpreter is chosen by TRITON_INTERPRET when the kernels are imported.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_bitlm.method import attention_triton, slot_attention_triton
from megatron_bitlm.method.attention_causal import CPU_KERNEL
from megatron_bitlm.method.attention_flash import FlashVariant, flash_block_causal_attention, flash_forward
from megatron_bitlm.method.attention_layout import BlockCausalLayout
from tests.method.test_attention import _inputs, _reference, _reference_mask, _values_and_grads

FUSED = FlashVariant(CPU_KERNEL, fused=True)


def errors(batch_size, seq_len, heads, head_dim, block_size, cu_seqlens, dtype="float32") -> dict[str, float]:
    """Largest differences from a softmax over the whole mask in float64."""
    inputs = _inputs(batch_size, seq_len, *heads, head_dim, getattr(torch, dtype))
    layout = BlockCausalLayout.build(batch_size, seq_len, block_size, cu_seqlens)
    scale = head_dim**-0.5
    mask = _reference_mask(batch_size, seq_len, block_size, cu_seqlens)
    wide = [x.double() for x in inputs]
    expected = _values_and_grads(lambda *qkv: _reference(*qkv, mask), *wide)
    found = _values_and_grads(lambda *qkv: flash_block_causal_attention(*qkv, layout, scale, FUSED), *inputs)
    _, lse, _ = flash_forward(*inputs[:3], layout, scale, FUSED)
    keys = wide[1].repeat_interleave(heads[0] // heads[1], 2)
    scores = torch.einsum("bihd,bjhd->bhij", wide[0], keys) * scale
    expected_lse = scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1).transpose(1, 2)
    pairs = zip(("out", "grad_q", "grad_k", "grad_v"), found, expected, strict=True)
    found_errors = {name: (a.double() - b).abs().max().item() for name, a, b in pairs}
    return {**found_errors, "lse": (lse.double() - expected_lse).abs().max().item()}


def slot_errors(num_blocks, num_slots, num_heads, head_dim, dtype="float32") -> dict[str, float]:
    """Largest differences of the kernels inside blocks from attention in float64."""
    generator = torch.Generator().manual_seed(0)
    width = num_heads * head_dim
    qkv = torch.randn(num_blocks, num_slots, 3 * width, generator=generator).to(getattr(torch, dtype))
    grad_out = torch.randn(num_blocks, num_slots, width, generator=generator).to(qkv.dtype)

    def values(attend, qkv, grad_out):
        qkv = qkv.clone().requires_grad_()
        out = attend(qkv, num_heads)
        return out.detach().double(), torch.autograd.grad(out, qkv, grad_out)[0].double()

    def plainly(qkv, num_heads):
        q, k, v = qkv.unflatten(2, (3, num_heads, head_dim)).unbind(2)
        weights = (torch.einsum("nihd,njhd->nhij", q, k) / head_dim**0.5).softmax(-1)
        return torch.einsum("nhij,njhd->nihd", weights, v).flatten(2)

    found = values(slot_attention_triton.fused_slot_attention, qkv, grad_out)
    expected = values(plainly, qkv.double(), grad_out.double())
    return {name: (a - b).abs().max().item() for name, a, b in zip(("out", "grad"), found, expected, strict=True)}


def compiled(kernel: str, capability: int, head_dim: int, block_size: int, heads: list[int]) -> dict[str, object]:
    """What ptxas says of a kernel for bfloat16 tensors on a GPU of this compute capability, which need not be here."""
    in_head = hasattr(slot_attention_triton, kernel)
    function = getattr(slot_attention_triton if in_head else attention_triton, kernel)
    with torch.device("meta"):
        if in_head:
            _, options = slot_attention_triton.launch(torch.empty(8, block_size, 3 * heads[0] * head_dim), heads[0])
        else:
            q, k = (torch.empty(block_size, num_heads, head_dim) for num_heads in heads)
            _, options = attention_triton.launch(q, k, block_size, (q, k))
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    types = {"lse_ptr": "*fp32", "num_tokens": "i32", "scale": "fp32", **dict.fromkeys(options, "constexpr")}
    signature = {name: types.get(name, "*bf16") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith("_ptr")}
    source = ASTSource(function, signature, options, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "kernel.ptx")
        text.write_text(found.asm["ptx"])
        target = f"sm_{capability}" + ("a" if capability >= 90 else "")
        command = [assembler, "-v", f"--gpu-name={target}", text, "-o", Path(folder, "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {"spills": "0 bytes spill stores" not in report, "shared": found.metadata.shared, "report": report}


if __name__ == "__main__":
    run = {"errors": errors, "slot_errors": slot_errors, "compiled": compiled}[sys.argv[1]]
    print(json.dumps([run(*case) for case in json.loads(sys.argv[2])]))
