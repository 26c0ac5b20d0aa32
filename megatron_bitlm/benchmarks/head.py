"""The diffusion head timed alone, forward and backward, against the softmax it replaces, on the same states.

What is timed is the objective of training: noise, noisy copies, head, loss, and the gradients of the head's weights
and of the backbone's states. The softmax is a linear layer to V and its cross-entropy. The optimizer is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison, take_turns
from megatron_bitlm.benchmarks.memory import peak_memory
from megatron_bitlm.benchmarks.report import check_output, describe_device, make_report, publish
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import DiffusionHead, HeadConfig
from megatron_bitlm.method.objective import DenoisingObjective, ObjectiveConfig
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig
from megatron_bitlm.model.flops import head_flops

_SOFTMAX = "softmax"


@dataclass(kw_only=True)
class HeadBenchmark(BenchmarkConfig):
    """The head on states of a backbone of some width.

    Attributes:
        hidden_size: Width d of the backbone.
        width_divisors: The head's widths as parts of d: 4 stands for w = d/4.
        depths: Numbers of its blocks.
        samples_per_block: Noisy copies r of a block.
        recompute: Activation checkpointing of the head: off, on, or both.
        num_tokens: Tokens of a pass, a multiple of m.
        block_size: m.
        vocab_size: V, of the codes and of the softmax.
        precision: `auto` is bf16 on a GPU and fp32 on a CPU.
        memory: Also measure each variant's peak memory, in a process of its own.
    """

    hidden_size: int = 1024
    width_divisors: list[int] = field(default_factory=lambda: [4, 2, 1])
    depths: list[int] = field(default_factory=lambda: [6])
    samples_per_block: list[int] = field(default_factory=lambda: [1, 4])
    recompute: Literal["off", "on", "both"] = "both"
    num_tokens: int = 512
    block_size: int = 4
    vocab_size: int = 151_936
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory: bool = True

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        super().validate()
        if self.num_tokens < 1 or self.block_size < 1 or self.num_tokens % self.block_size:
            raise BitLMError(f"num_tokens {self.num_tokens} is not a multiple of block_size {self.block_size}")
        for divisor in self.width_divisors:
            if divisor < 1 or self.hidden_size % divisor:
                raise BitLMError(f"width_divisors: {divisor} does not divide hidden_size {self.hidden_size}")
        if not (self.width_divisors and self.depths and self.samples_per_block):
            raise BitLMError("width_divisors, depths and samples_per_block must each name at least one value")

    def dtype(self) -> torch.dtype:
        """Of weights and states."""
        is_half = self.torch_device().type == "cuda" if self.precision == "auto" else self.precision == "bf16"
        return torch.bfloat16 if is_half else torch.float32


@dataclass(frozen=True)
class Shape:
    """One head: width, blocks, noisy copies, and whether its layers are run again in backward."""

    width: int
    depth: int
    num_samples: int
    recomputes: bool

    @property
    def name(self) -> str:
        """For example w256_l6_r1, with _recompute at the end where it does."""
        return f"w{self.width}_l{self.depth}_r{self.num_samples}" + ("_recompute" if self.recomputes else "")

    def config(self) -> HeadConfig:
        """As the model's setting."""
        return HeadConfig(width=self.width, num_layers=self.depth, activation_checkpointing=self.recomputes)


def bench_head(settings: HeadBenchmark, output: Path | None = None) -> dict[str, Any]:
    """Times the heads and the softmax, prints a table and returns the figures (also as JSON in ``output``).

    Raises:
        BitLMError: A head that cannot be built, or an ``output`` that exists.
    """
    check_output(output)
    settings.validate()
    device = settings.torch_device()
    machine = describe_device(device)
    names = [_SOFTMAX, *(shape.name for shape in shapes(settings))]
    peaks = {name: peak_memory(build_call, settings, name, device) for name in names} if settings.memory else {}
    calls = {name: build_call(settings, name) for name in names}
    turns = take_turns(calls, settings, device)
    comparison = Comparison(_SOFTMAX, turns, dict.fromkeys(names, float(settings.num_tokens)), "tokens", peaks)
    facts = _facts(settings)
    lines = [
        f"head and loss, forward + backward: {settings.num_tokens} tokens, d = {settings.hidden_size}, "
        f"m = {settings.block_size}, V = {settings.vocab_size:,}, {settings.dtype()}",
        comparison.table(),
        *(
            f"{name}: {found['num_parameters'] / 1e6:.1f} M parameters, "
            f"{found['flops_per_token'] / 1e6:,.0f} MFLOP a token"
            for name, found in facts.items()
        ),
    ]
    return publish(make_report("head", settings, machine, comparison, facts), "\n".join(lines), output)


def shapes(settings: HeadBenchmark) -> list[Shape]:
    """Every head the settings ask for."""
    again = {"off": [False], "on": [True], "both": [False, True]}[settings.recompute]
    return [
        Shape(settings.hidden_size // divisor, depth, num_samples, recomputes)
        for divisor in settings.width_divisors
        for depth in settings.depths
        for num_samples in settings.samples_per_block
        for recomputes in again
    ]


def build_call(settings: HeadBenchmark, name: str) -> Callable[[], object]:
    """One variant alone: a call is one forward and backward pass.

    Raises:
        BitLMError: A head that cannot be built.
    """
    torch.manual_seed(0)
    if name == _SOFTMAX:
        return _softmax_call(settings)
    return _head_call(settings, next(shape for shape in shapes(settings) if shape.name == name))


def _head_call(settings: HeadBenchmark, shape: Shape) -> Callable[[], object]:
    device, dtype = settings.torch_device(), settings.dtype()
    code = BinaryCode(settings.vocab_size)
    sizes = {"num_bits": code.num_bits, "block_size": settings.block_size, "condition_size": settings.hidden_size}
    try:
        head = DiffusionHead(shape.config(), **sizes).to(device, dtype)
        objective = DenoisingObjective(ObjectiveConfig(samples_per_block=shape.num_samples), code, seed=0)
    except ValueError as error:
        raise BitLMError(f"the head {shape.name} cannot be built: {error}") from error
    num_blocks = settings.num_tokens // settings.block_size
    ids = torch.randint(settings.vocab_size, (1, num_blocks, settings.block_size), device=device)
    clean = code.encode(ids)
    condition = torch.randn(*ids.shape, settings.hidden_size, device=device, dtype=dtype, requires_grad=True)
    sample, block = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(num_blocks, device=device)
    leaves = [condition, *(p for p in head.parameters() if p.requires_grad)]

    def run() -> object:
        losses = objective(head, condition, clean, sample, block)
        return torch.autograd.grad(losses.objective.mean(), leaves, allow_unused=True)

    return run


def _softmax_call(settings: HeadBenchmark) -> Callable[[], object]:
    device, dtype = settings.torch_device(), settings.dtype()
    layer = nn.Linear(settings.hidden_size, settings.vocab_size, bias=False, device=device, dtype=dtype)
    targets = torch.randint(settings.vocab_size, (settings.num_tokens,), device=device)
    states = torch.randn(settings.num_tokens, settings.hidden_size, device=device, dtype=dtype, requires_grad=True)

    def run() -> object:
        loss = F.cross_entropy(layer(states).float(), targets)
        return torch.autograd.grad(loss, [states, layer.weight])

    return run


def _facts(settings: HeadBenchmark) -> dict[str, dict[str, float]]:
    """Parameters, and model FLOPs of a token, of every variant."""
    d, v = settings.hidden_size, settings.vocab_size
    code = BinaryCode(v)
    found: dict[str, dict[str, float]] = {_SOFTMAX: {"num_parameters": d * v, "flops_per_token": 6.0 * d * v}}
    for shape in shapes(settings):
        model = ModelConfig(
            backbone=BackboneOverrides(hidden_size=d), block_size=settings.block_size, head=shape.config()
        )
        with torch.device("meta"):
            head = DiffusionHead(
                shape.config(), num_bits=code.num_bits, block_size=settings.block_size, condition_size=d
            )
        found[shape.name] = {
            "num_parameters": sum(parameter.numel() for parameter in head.parameters()),
            "flops_per_token": head_flops(model, code.num_bits, shape.num_samples),
        }
    return found
