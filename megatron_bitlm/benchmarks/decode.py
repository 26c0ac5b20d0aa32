"""Decoding timed: BitLM against the softmax baseline, with one backbone's weights, engine and kind of cache.

A turn decodes the same number of new tokens in every row, behind prompts that were read before the first turn; rows
grow from turn to turn, in every variant alike. Weights are random, as time does not depend on them, and no row ends.
The softmax is greedy, its fastest way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison, take_turns
from megatron_bitlm.benchmarks.report import check_output, describe_device, make_report, publish
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.decoders import BlockDecoder, TokenDecoder
from megatron_bitlm.inference.engine import Engine
from megatron_bitlm.inference.prompts import Request
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.method.token_sampling import TokenSamplerConfig
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, build_chunks, unwrap
from megatron_bitlm.model.presets import backbone_preset
from megatron_bitlm.model.softmax import SoftmaxConfig, SoftmaxLM
from megatron_bitlm.parallel.state import ParallelConfig, ParallelState, initialize_parallel, shutdown_parallel

_SOFTMAX = "softmax"
_NO_ID = -1
_SURE_LOGIT = 6.0  # tanh(3) = 0.995
_SURE = 0.9


@dataclass(kw_only=True)
class DecodeBenchmark(BenchmarkConfig):
    """Decoding on one device.

    Attributes:
        preset: Backbone shape: tiny, 0.6B, 1.7B, 4B or 8B.
        num_layers: Layers of the backbone; 0 for all of the preset's. The fewer, the more head and softmax weigh.
        vocab_size: V.
        block_size: m.
        width_divisors: The heads' widths as parts of d: 4 stands for w = d/4.
        head_layers: Their blocks.
        num_steps: Denoising steps K.
        guidance: Of the variants not called unguided.
        early_exit_evaluations: Each width also with blocks that end after so many evaluations; 0 leaves this out.
        batch_size: Rows decoded together.
        prompt_tokens: Of every row.
        num_tokens: New tokens of every row in a turn, a multiple of m.
        precision: `auto` is bf16 on a GPU and fp32 on a CPU.
    """

    preset: str = "0.6B"
    num_layers: int = 0
    vocab_size: int = 151_936
    block_size: int = 4
    width_divisors: list[int] = field(default_factory=lambda: [4, 1])
    head_layers: int = 6
    num_steps: int = 15
    guidance: float = 9.0
    early_exit_evaluations: int = 8
    batch_size: int = 1
    prompt_tokens: int = 64
    num_tokens: int = 16
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        super().validate()
        if self.num_tokens < 1 or self.block_size < 1 or self.num_tokens % self.block_size:
            raise BitLMError(f"num_tokens {self.num_tokens} is not a multiple of block_size {self.block_size}")
        if self.batch_size < 1 or self.num_layers < 0 or self.prompt_tokens < 0:
            raise BitLMError("batch_size must be at least 1, num_layers and prompt_tokens not negative")
        if not 0 <= self.early_exit_evaluations <= self.num_steps:
            raise BitLMError(
                f"early_exit_evaluations must lie in 0..num_steps ({self.num_steps}), got {self.early_exit_evaluations}"
            )
        hidden_size = backbone_preset(self.preset).hidden_size
        for divisor in self.width_divisors:
            if divisor < 1 or hidden_size % divisor:
                raise BitLMError(f"width_divisors: {divisor} does not divide the width {hidden_size} of {self.preset}")

    def precision_name(self) -> Literal["fp32", "bf16"]:
        """Of weights and states."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if self.torch_device().type == "cuda" else "fp32"

    def model_config(self, output: Literal["diffusion", "softmax"], width: int | None = None) -> ModelConfig:
        """A variant's model; `width` is the head's."""
        return ModelConfig(
            preset=self.preset,
            backbone=BackboneOverrides(num_layers=self.num_layers or None),
            output=output,
            block_size=self.block_size,
            head=HeadConfig(width=width, num_layers=self.head_layers),
            softmax=SoftmaxConfig(tie_embeddings=True),
        )

    def samplers(self) -> dict[str, SamplerConfig]:
        """By what is added to the name of a width."""
        found = {
            "": SamplerConfig(num_steps=self.num_steps, guidance=self.guidance),
            "_unguided": SamplerConfig(num_steps=self.num_steps, guidance=1.0),
        }
        if self.early_exit_evaluations:
            found[f"_exit{self.early_exit_evaluations}"] = SamplerConfig(
                num_steps=self.num_steps,
                guidance=self.guidance,
                early_exit=_SURE,
                early_exit_steps=self.early_exit_evaluations,
            )
        return found


def bench_decode(settings: DecodeBenchmark, output: Path | None = None) -> dict[str, Any]:
    """Times the variants, prints a table and returns the figures (also as JSON in ``output``).

    Raises:
        BitLMError: Settings that cannot be built or run here, or an ``output`` that exists.
    """
    check_output(output)
    settings.validate()
    machine = describe_device(settings.torch_device())
    state = initialize_parallel(ParallelConfig(), seed=0, model=settings.model_config("softmax").resolve_backbone())
    try:
        if state.device.type != settings.torch_device().type:
            raise BitLMError(
                f"device is {settings.device}, but models take the GPU where there is one; to time the CPU beside it, "
                "set CUDA_VISIBLE_DEVICES to nothing"
            )
        variants = build_variants(settings, state)
        turns = take_turns(variants, settings, state.device)
        facts = {name: variant.shares(state.device) for name, variant in variants.items()}
    finally:
        shutdown_parallel()
    amounts = dict.fromkeys(variants, float(settings.batch_size * settings.num_tokens))
    comparison = Comparison(_SOFTMAX, turns, amounts, "tokens")
    backbone = backbone_preset(settings.preset)
    lines = [
        f"decoding: {settings.preset} with {settings.num_layers or backbone.num_layers} of its {backbone.num_layers} "
        f"layers, V = {settings.vocab_size:,}, m = {settings.block_size}, K = {settings.num_steps}, guidance "
        f"{settings.guidance:g}, batch {settings.batch_size}, {settings.precision_name()}",
        comparison.table(),
        *(f"{name}: {found['backbone']:.0%} backbone, {found['output']:.0%} output" for name, found in facts.items()),
    ]
    return publish(make_report("decode", settings, machine, comparison, facts), "\n".join(lines), output)


class Variant:
    """An engine with a full batch; a call decodes the next `num_tokens` tokens of every row.

    Args:
        decoder: Of the model.
        sampler: For every row.
        settings: Sizes.
    """

    def __init__(
        self,
        decoder: BlockDecoder | TokenDecoder,
        sampler: SamplerConfig | TokenSamplerConfig,
        settings: DecodeBenchmark,
    ) -> None:
        self.decoder, self.settings = decoder, settings
        decoder.eos_id = _NO_ID  # no row ends before its limit
        self.num_calls_left = settings.num_warmup + settings.num_repetitions + 1  # and one to find the shares
        # One block more than is decoded, and another in place of a last one that would end the row.
        num_new = self.num_calls_left * settings.num_tokens + 2 * settings.block_size
        length = settings.prompt_tokens + num_new + 2 * settings.block_size
        self.engine = Engine(decoder, max_batch_size=settings.batch_size, max_length=length)
        generator = torch.Generator().manual_seed(0)
        for row in range(settings.batch_size):
            prompt = torch.randint(settings.vocab_size, (settings.prompt_tokens,), generator=generator).tolist()
            self.engine.add(Request(prompt, num_new, seed=row, sampler=sampler))
        self.engine.step()  # reads the prompts

    def __call__(self) -> int:
        """Returns the tokens that every row got."""
        self.num_calls_left -= 1
        return sum(len(self.engine.step()[0].ids) for _ in range(self.settings.num_tokens // self.decoder.block_size))

    def shares(self, device: torch.device) -> dict[str, float]:
        """Decodes once more, waiting for the device around each part: their shares of the time."""
        seconds = {"backbone": 0.0, "output": 0.0}
        parts = {"backbone": "states", "output": "realise"}
        with _timed(self.decoder, parts, seconds, device):
            began = _now(device)
            self()
            whole = _now(device) - began
        return {part: value / whole for part, value in seconds.items()}


def build_variants(settings: DecodeBenchmark, state: ParallelState) -> dict[str, Variant]:
    """The softmax and every head, with the same weights in all backbones.

    Raises:
        BitLMError: A model that cannot be built.
    """
    code = BinaryCode(settings.vocab_size)

    def build(config: ModelConfig) -> Any:
        ids = {"bos_id": settings.vocab_size - 2, "eos_id": settings.vocab_size - 1}
        precision = settings.precision_name()
        return unwrap(build_chunks(config, state, code=code, **ids, precision=precision, seed=0)[0]).eval()

    baseline: SoftmaxLM = build(settings.model_config("softmax"))
    variants = {_SOFTMAX: Variant(TokenDecoder(baseline), TokenSamplerConfig(temperature=0.0), settings)}
    for divisor in settings.width_divisors:
        width = backbone_preset(settings.preset).hidden_size // divisor
        model: BitLM = build(settings.model_config("diffusion", width))
        _share_backbone(baseline, model)
        # A head of random weights is never sure; this one says the same at every step, and is.
        with torch.no_grad():
            model.head.output.bias.copy_(_SURE_LOGIT * code.encode(torch.zeros(1, dtype=torch.int64))[0])
        for suffix, sampler in settings.samplers().items():
            decoder = BlockDecoder(model, code, bos_id=settings.vocab_size - 2, eos_id=settings.vocab_size - 1)
            variants[f"w{width}{suffix}"] = Variant(decoder, sampler, settings)
    return variants


def _share_backbone(source: SoftmaxLM, target: BitLM) -> None:
    """Memory for one backbone: only the outputs differ."""
    for own, other in zip(target.decoder.parameters(), source.decoder.parameters(), strict=True):
        own.data = other.data


@contextmanager
def _timed(target: object, methods: dict[str, str], seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Adds the time spent in an object's methods to `seconds`, by their names in `methods`."""

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = _now(device)
            result = call(*arguments)
            seconds[name] += _now(device) - began
            return result

        return timed

    for name, method in methods.items():
        setattr(target, method, wrap(name, getattr(target, method)))
    try:
        yield
    finally:
        for method in methods.values():
            delattr(target, method)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
