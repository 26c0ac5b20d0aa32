"""Whole training steps timed: BitLM against the softmax baseline on the same backbone, through the trainer's own code.

A step is forward, backward, gradient norm and Adam, on micro-batches that lie on the device already. The ids are
random: nothing here depends on what they say.
"""

from __future__ import annotations

import atexit
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_bitlm.benchmarks.datasets import write_random_dataset
from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison, take_turns
from megatron_bitlm.benchmarks.memory import peak_memory
from megatron_bitlm.benchmarks.report import check_output, describe_device, make_report, publish
from megatron_bitlm.data.card import load_dataset_code, read_card
from megatron_bitlm.data.packing import DataConfig
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.method.objective import ObjectiveConfig
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, describe_choices
from megatron_bitlm.model.flops import token_flops
from megatron_bitlm.model.fp8 import Fp8Config
from megatron_bitlm.model.presets import backbone_preset
from megatron_bitlm.model.softmax import SoftmaxConfig
from megatron_bitlm.parallel.state import ParallelState, initialize_parallel, shutdown_parallel
from megatron_bitlm.training.config import RunConfig, RunSection, TrainingConfig
from megatron_bitlm.training.flops import device_peak
from megatron_bitlm.training.likelihood import ValidationConfig
from megatron_bitlm.training.optimizer import OptimizerConfig
from megatron_bitlm.training.session import DataFacts, Session

VARIANTS = ("softmax", "bitlm", "softmax_fp8", "bitlm_fp8")
_TIED_PRESETS = ("tiny", "0.6B", "1.7B", "4B")  # as Qwen3's models of these sizes


@dataclass(kw_only=True)
class StepBenchmark(BenchmarkConfig):
    """A training step on one device.

    Attributes:
        preset: Backbone shape: tiny, 0.6B, 1.7B, 4B or 8B.
        num_layers: Layers of the backbone; 0 for all of the preset's. The fewer, the more head and softmax weigh.
        variants: Among softmax, bitlm, softmax_fp8 and bitlm_fp8; the first is the one the others are compared with.
        vocab_size: V.
        block_size: m.
        head_width: Width w of the diffusion head; 0 for a quarter of the backbone's.
        head_layers: Its blocks.
        samples_per_block: r, noisy copies of a block.
        recompute_head: Activation checkpointing of the head.
        sequence_length: S.
        micro_batch_size: Samples of a pass.
        num_micro_batches: Passes of a step.
        document_tokens: Tokens of every document; 0 makes a sample one document.
        precision: `auto` is bf16 on a GPU and fp32 on a CPU.
        fp8_recipe: Of the fp8 variants: delayed, tensorwise or blockwise.
        fp8_bf16_layers: Layers that stay in bf16 at each end of the backbone in the fp8 variants; `delayed` takes 0.
        attention_backend: As `model.attention_backend`.
        implementation: As `model.implementation`.
        memory: Also measure each variant's peak memory, in a process of its own.
    """

    preset: str = "0.6B"
    num_layers: int = 4
    variants: list[str] = field(default_factory=lambda: ["softmax", "bitlm"])
    vocab_size: int = 151_936
    block_size: int = 4
    head_width: int = 0
    head_layers: int = 6
    samples_per_block: int = 1
    recompute_head: bool = False
    sequence_length: int = 512
    micro_batch_size: int = 1
    num_micro_batches: int = 1
    document_tokens: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    fp8_bf16_layers: int = 1
    attention_backend: str = "auto"
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    memory: bool = True

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        super().validate()
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants or len(set(self.variants)) < len(self.variants):
            raise BitLMError(f"variants must be some of {', '.join(VARIANTS)}, each once, got {self.variants}")
        for name in ("num_micro_batches", "micro_batch_size", "sequence_length", "block_size"):
            if getattr(self, name) < 1:
                raise BitLMError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.document_tokens < 0 or self.num_layers < 0 or self.head_width < 0:
            raise BitLMError("document_tokens, num_layers and head_width must not be negative")

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of a step."""
        return self.num_micro_batches * self.micro_batch_size * self.sequence_length


def bench_step(settings: StepBenchmark, output: Path | None = None) -> dict[str, Any]:
    """Times the variants, prints a table and returns the figures (also as JSON in ``output``).

    Raises:
        BitLMError: settings that cannot be built or run here, or an ``output`` that exists.
    """
    check_output(output)
    settings.validate()
    device = settings.torch_device()
    machine = describe_device(device)
    with tempfile.TemporaryDirectory(prefix="bitlm-bench-") as folder:
        prefix = _write_data(settings, Path(folder))
        for name in settings.variants:
            run_config(settings, name, prefix).validate()
        request = (settings, prefix)
        peaks = {n: peak_memory(build_call, request, n, device) for n in settings.variants} if settings.memory else {}
        state = _initialize(settings, settings.variants[0], prefix)
        try:
            steps = {name: TimedStep(run_config(settings, name, prefix), state) for name in settings.variants}
            turns = take_turns(steps, settings, device)
            facts = {name: step.facts(turns.seconds[name]) for name, step in steps.items()}
            for step in steps.values():
                step.session.close()
        finally:
            shutdown_parallel()
    amounts = dict.fromkeys(settings.variants, float(settings.tokens_per_step))
    comparison = Comparison(settings.variants[0], turns, amounts, "tokens", peaks)
    backbone = backbone_preset(settings.preset)
    lines = [
        f"training step: {settings.preset} with {settings.num_layers or backbone.num_layers} of its "
        f"{backbone.num_layers} layers, V = {settings.vocab_size:,}, {settings.num_micro_batches} x "
        f"{settings.micro_batch_size} x {settings.sequence_length} tokens",
        comparison.table(),
        *(f"{name}: {_fact_line(found)}" for name, found in facts.items()),
    ]
    return publish(make_report("step", settings, machine, comparison, facts), "\n".join(lines), output)


class TimedStep:
    """A session of the trainer; a call is its next step, on the same micro-batches every time.

    Args:
        config: The run.
        state: This process's place, initialised.
    """

    def __init__(self, config: RunConfig, state: ParallelState) -> None:
        prefix = config.data.paths[0]
        card, code = read_card(prefix), load_dataset_code(prefix)
        facts = DataFacts(card, code, _NoText(card.vocab_size), prefix)  # type: ignore[arg-type]
        self.session = Session(config, facts, state, Path(config.run.directory))
        batches = list(itertools.islice(self.session.loader(0), self.session.num_micro_batches))
        self._inputs = self.session.next_inputs(iter(batches))
        self._visible_keys = _mean_visible_keys(
            [batch.cu_seqlens.numpy() for batch in batches], config.model.attention_block_size
        )
        self._numbers = itertools.count(1)

    def __call__(self) -> float:
        """Does a step; returns its loss.

        Raises:
            BitLMError: The loss or a gradient is not finite.
        """
        result = self.session.step(next(self._numbers), self._inputs)
        if result.diagnosis is not None:
            raise BitLMError(
                f"a step of the benchmark is not finite (loss {result.metrics.loss}); its time means nothing"
            )
        return result.metrics.loss

    def facts(self, seconds: Sequence[float]) -> dict[str, Any]:
        """Sizes, kernels, FLOPs of a token, and what share of the device's peak the steps reached."""
        config, device = self.session.config, self.session.state.device
        tokens = config.training.global_batch_size * config.data.sequence_length
        flops = token_flops(
            config.model, self.session.facts.card.vocab_size, config.objective.samples_per_block, self._visible_keys
        )
        rate = flops.total * tokens / float(np.median(seconds))
        peak = device_peak(config, device)
        return {
            "num_parameters": sum(p.numel() for chunk in self.session.chunks for p in chunk.parameters()),
            "kernels": describe_choices(config.model, device, config.training.precision, config.training.fp8),
            "mean_visible_keys": self._visible_keys,
            "flops_per_token": {**vars(flops), "total": flops.total},
            "model_flops_per_second": rate,
            "peak_flops_per_second": peak,
            "mfu": rate / peak if peak else None,
        }


def run_config(settings: StepBenchmark, name: str, prefix: Path) -> RunConfig:
    """The run that a variant is a step of."""
    backbone = backbone_preset(settings.preset)
    head_width = settings.head_width or max(backbone.hidden_size // 4, 2)
    fp8 = name.endswith("_fp8")
    return RunConfig(
        run=RunSection(directory=str(prefix.parent / "run")),
        model=ModelConfig(
            preset=settings.preset,
            backbone=BackboneOverrides(num_layers=settings.num_layers or None),
            output="softmax" if name.startswith("softmax") else "diffusion",
            block_size=settings.block_size,
            head=HeadConfig(
                width=head_width, num_layers=settings.head_layers, activation_checkpointing=settings.recompute_head
            ),
            softmax=SoftmaxConfig(tie_embeddings=settings.preset in _TIED_PRESETS),
            attention_backend=settings.attention_backend,  # type: ignore[arg-type]
            implementation=settings.implementation,
        ),
        objective=ObjectiveConfig(samples_per_block=settings.samples_per_block),
        data=DataConfig(paths=[str(prefix)], sequence_length=settings.sequence_length, split="50,50"),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
        training=TrainingConfig(
            num_steps=1,
            global_batch_size=settings.num_micro_batches * settings.micro_batch_size,
            micro_batch_size=settings.micro_batch_size,
            precision=_precision(settings),
            fp8=Fp8Config(
                recipe=settings.fp8_recipe if fp8 else "none",
                num_bf16_layers_at_start=settings.fp8_bf16_layers,
                num_bf16_layers_at_end=settings.fp8_bf16_layers,
            ),
        ),
        validation=ValidationConfig(num_samples=settings.micro_batch_size),
    )


def build_call(request: tuple[StepBenchmark, Path], name: str) -> Callable[[], object]:
    """One variant alone in this process: a call is a training step."""
    settings, prefix = request
    state = _initialize(settings, name, prefix)
    atexit.register(shutdown_parallel)
    return TimedStep(run_config(settings, name, prefix), state)


@dataclass
class _NoText:
    """Stands where a session wants the tokenizer of its data: ids that mean no text."""

    vocab_size: int

    def token_num_bytes(self) -> np.ndarray:
        """Zero for every id."""
        return np.zeros(self.vocab_size, dtype=np.int64)


def _initialize(settings: StepBenchmark, name: str, prefix: Path) -> ParallelState:
    config = run_config(settings, name, prefix)
    state = initialize_parallel(config.parallel, seed=0, model=config.model.resolve_backbone())
    if state.device.type != settings.torch_device().type:
        shutdown_parallel()
        raise BitLMError(
            f"device is {settings.device}, but the trainer takes the GPU where there is one; to time the CPU beside "
            "it, set CUDA_VISIBLE_DEVICES to nothing"
        )
    return state


def _precision(settings: StepBenchmark) -> Literal["fp32", "bf16"]:
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if settings.torch_device().type == "cuda" else "fp32"


def _write_data(settings: StepBenchmark, folder: Path) -> Path:
    """Training and validation documents, each half enough for its samples."""
    num_samples = settings.num_micro_batches * settings.micro_batch_size + 1
    needed = (num_samples + 1) * settings.sequence_length
    length = settings.document_tokens or needed
    prefix = folder / "random"
    write_random_dataset(
        prefix,
        2 * -(-needed // length),
        length,
        vocab_size=settings.vocab_size,
        block_size=settings.block_size,
    )
    return prefix


def _mean_visible_keys(offsets: list[np.ndarray], block_size: int) -> float:
    """Keys that a query of the batches sees on average: (L + m) / 2 in a document piece of L tokens."""
    lengths = np.concatenate([np.diff(cu_seqlens) for cu_seqlens in offsets]).astype(np.float64)
    return float((lengths * (lengths + block_size) / 2).sum() / lengths.sum())


def _fact_line(found: dict[str, Any]) -> str:
    mfu = "MFU unknown" if found["mfu"] is None else f"MFU {found['mfu']:.1%}"
    return (
        f"{found['num_parameters'] / 1e6:,.1f} M parameters, {found['flops_per_token']['total'] / 1e9:,.2f} GFLOP a "
        f"token, {found['model_flops_per_second'] / 1e12:,.3f} TFLOP/s, {mfu}; {found['kernels']}"
    )
