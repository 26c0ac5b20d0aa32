"""The fused kernels of backbone and head: against a float64 softmax in Triton's interpreter, and compiled for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

ROOT = Path(__file__).resolve().parent.parent.parent
PACKED = [0, 16, 24, 48, 64, 88, 96]


def run(what: str, cases: list[list], tmp_path: Path, **environment: str) -> list[dict]:
    command = [sys.executable, "-m", "tests.method.triton_run", what, json.dumps(cases)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TOLERANCES = {"float32": 2e-5, "float16": 8e-3}


def test_kernels_equal_a_softmax_over_the_mask(tmp_path):
    cases = [
        # rows, tokens a row, heads, head dim, m, documents
        [1, 64, [4, 2], 64, 2, None, "float32"],
        [2, 48, [4, 1], 16, 4, [0, 4, 24, 48, 96], "float32"],
        [2, 48, [4, 4], 64, 4, None, "float32"],
        [2, 48, [4, 2], 128, 8, PACKED, "float32"],
        [1, 96, [2, 1], 32, 16, [0, 16, 48, 96], "float32"],
        [1, 45, [2, 2], 16, 3, [0, 6, 45], "float32"],  # tiles of 15 tokens
        [1, 80, [2, 1], 40, 20, None, "float32"],  # a head dim and blocks that are no powers of two
        [1, 128, [1, 1], 16, 64, None, "float32"],
        [2, 48, [4, 2], 64, 4, PACKED, "float16"],
    ]
    for case, errors in zip(cases, run("errors", cases, tmp_path, TRITON_INTERPRET="1"), strict=True):
        tolerance = TOLERANCES[case[-1]]
        assert max(errors.values()) <= tolerance, (case, errors)
        assert errors["lse"] <= tolerance / 4, (case, errors)


def test_slot_kernels_equal_plain_attention(tmp_path):
    # blocks, slots, heads, head dim: tiles that are full or not, one slot, a head dim that is no power of two
    shapes = [[13, 4, 2, 16], [5, 3, 1, 24], [9, 1, 2, 8], [3, 16, 2, 32], [2, 40, 1, 16], [7, 2, 1, 128]]
    cases = [[*shape, "float32"] for shape in shapes] + [[13, 4, 2, 16, "float16"]]
    for case, errors in zip(cases, run("slot_errors", cases, tmp_path, TRITON_INTERPRET="1"), strict=True):
        assert max(errors.values()) <= TOLERANCES[case[-1]], (case, errors)


def test_kernels_compile_for_gpus_without_spilling(tmp_path):
    """Ampere, Ada (the least shared memory, 99 KiB a program) and Hopper, at the presets' head dims."""
    shapes = [[80, 128, 4], [89, 128, 16], [90, 128, 4], [90, 64, 8], [90, 256, 4]]
    kernels = ("_merge_kernel", "_grads_kernel", "_forward_kernel", "_backward_kernel")
    cases = [[kernel, *shape, [4, 2]] for kernel in kernels for shape in shapes]
    for case, found in zip(cases, run("compiled", cases, tmp_path), strict=True):
        assert not found["spills"], (case, found["report"])
        assert found["shared"] <= 99 * 1024, (case, found["shared"])


def test_what_the_kernels_refuse():
    import torch

    from megatron_bitlm.method.attention_triton import merge_later_keys

    q, lse = torch.zeros(256, 2, 16), torch.zeros(2, 256)
    with pytest.raises(ValueError, match="2 to 64 tokens, got 128; use the attention backend flash_eager"):
        merge_later_keys(q, q, q, q, lse, 128, 1.0)
    with pytest.raises(ValueError, match="256 tokens are not a whole number of blocks of 3"):
        merge_later_keys(q, q, q, q, lse, 3, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        merge_later_keys(q, q, q, q, torch.zeros(256, 2).t(), 4, 1.0)
