"""How long training stands still for a checkpoint that is written beside it, against one that it waits for.

The two kinds of save take turns on one training session. A turn is a save and the optimiser steps after it; the stall
is the time inside the calls that save (and, while a background save is on its way, that ask at every step whether it is
done). What a background write costs the steps themselves, by the cores and the memory it takes, shows beside it: the
seconds of the whole turn less those of as many steps without any save.
"""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison, Turns
from megatron_bitlm.benchmarks.report import check_output, describe_device, make_report, publish
from megatron_bitlm.data.packing import DataConfig
from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.checkpoint import find_checkpoint, read_meta
from megatron_bitlm.model.presets import BackboneConfig
from megatron_bitlm.parallel.state import initialize_parallel, shutdown_parallel
from megatron_bitlm.training.checkpoint import CheckpointManager
from megatron_bitlm.training.config import RunConfig, TrainingConfig, flat_settings
from megatron_bitlm.training.likelihood import ValidationConfig
from megatron_bitlm.training.session import Session, read_data_facts

_BLOCKING, _ASYNCHRONOUS, _NONE = "blocking", "asynchronous", "no_save"


@dataclass(kw_only=True)
class CheckpointBenchmark(BenchmarkConfig):
    """Saves of a model of random weights with its optimizer's state, in one process.

    Attributes:
        num_layers: Of the backbone.
        hidden_size: Of the backbone, a multiple of 64.
        sequence_length: Tokens of a sample.
        batch_size: Samples of a step.
        num_steps: Steps after each save, of which a background save should need fewer.
        folder: Where checkpoints are written and removed; null takes the system's folder for temporary files.
    """

    num_layers: int = 6
    hidden_size: int = 512
    sequence_length: int = 256
    batch_size: int = 4
    num_steps: int = 6
    folder: str | None = None

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        super().validate()
        for name in ("num_layers", "sequence_length", "batch_size", "num_steps"):
            if getattr(self, name) < 1:
                raise BitLMError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size < 64 or self.hidden_size % 64:
            raise BitLMError(f"hidden_size must be a multiple of 64, got {self.hidden_size}")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise BitLMError(f"folder {self.folder}: no such folder")


@dataclass
class Turn:
    """Seconds of one turn: inside the saving calls, and of all of it."""

    stall: float
    whole: float


def bench_checkpoint(settings: CheckpointBenchmark, output: Path | None = None) -> dict[str, Any]:
    """Times the two kinds of save, prints a table and returns the figures (also as JSON in ``output``).

    Raises:
        BitLMError: Settings that do not fit, or an ``output`` that exists.
    """
    check_output(output)
    settings.validate()
    with tempfile.TemporaryDirectory(prefix="bitlm-bench-", dir=settings.folder) as folder:
        with _session(settings, Path(folder)) as session:
            machine = describe_device(session.state.device)
            turns = _take_turns(session, settings, Path(folder))
        files = read_meta(find_checkpoint(Path(folder) / _BLOCKING))["files"]
    stalls = {name: [turn.stall for turn in turns[name]] for name in (_BLOCKING, _ASYNCHRONOUS)}
    comparison = Comparison(_BLOCKING, Turns(stalls))
    whole = {name: np.array([turn.whole for turn in found]) for name, found in turns.items()}
    slowdown = {name: (whole[name] - whole[_NONE]).tolist() for name in (_BLOCKING, _ASYNCHRONOUS)}
    facts = {
        "checkpoint_bytes": sum(file["bytes"] for file in files.values()),
        "num_parameters": sum(p.numel() for chunk in session.chunks for p in chunk.parameters()),
        "step_seconds_without_saves": float(np.median(whole[_NONE]) / settings.num_steps),
        "extra_seconds_of_a_turn": slowdown,
        "ratio_of_extra_seconds": float(np.median(slowdown[_ASYNCHRONOUS]) / np.median(slowdown[_BLOCKING])),
    }
    text = "\n".join(
        [
            f"stall of training by a save of {facts['checkpoint_bytes'] / 1e6:,.0f} MB "
            f"({facts['num_parameters'] / 1e6:.1f} M parameters), a step takes "
            f"{facts['step_seconds_without_saves'] * 1e3:,.0f} ms",
            comparison.table(),
            f"a save and the {settings.num_steps} steps after it, less as many steps alone: blocking "
            f"{np.median(slowdown[_BLOCKING]):.2f} s, asynchronous {np.median(slowdown[_ASYNCHRONOUS]):.2f} s "
            f"({facts['ratio_of_extra_seconds']:.2f})",
        ]
    )
    return publish(make_report("checkpoint", settings, machine, comparison, facts), text, output)


@contextlib.contextmanager
def _session(settings: CheckpointBenchmark, folder: Path) -> Iterator[Session]:
    """A session that could train on made-up text."""
    config = _run_config(settings, _make_dataset(settings, folder))
    config.validate()
    facts = read_data_facts(config)
    state = initialize_parallel(config.parallel, seed=0, model=config.model.resolve_backbone())
    try:
        if state.device.type != settings.torch_device().type:
            raise BitLMError(f"device is {settings.device}, but training here takes {state.device}")
        yield Session(config, facts, state, folder / _BLOCKING)
    finally:
        shutdown_parallel()


def _make_dataset(settings: CheckpointBenchmark, folder: Path) -> str:
    generator = random.Random(0)
    lines = ("".join(generator.choices("abcdefgh ", k=settings.sequence_length)) for _ in range(256))
    source = folder / "text.jsonl"
    source.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    prefix = str(folder / "data")
    with contextlib.redirect_stderr(io.StringIO()):
        preprocess(PreprocessConfig(input=[str(source)], output=prefix, tokenizer="bytes", num_workers=1))
    return prefix


def _run_config(settings: CheckpointBenchmark, prefix: str) -> RunConfig:
    config = RunConfig()
    num_heads = settings.hidden_size // 64
    config.model.backbone = BackboneConfig(
        settings.num_layers, settings.hidden_size, 3 * settings.hidden_size, num_heads, num_heads, head_dim=64
    )
    config.data = DataConfig(paths=[prefix], sequence_length=settings.sequence_length, split="50,50,0")
    config.training = TrainingConfig(
        num_steps=1_000_000, global_batch_size=settings.batch_size, micro_batch_size=settings.batch_size
    )
    config.validation = ValidationConfig(num_samples=settings.batch_size)
    return config


def _take_turns(session: Session, settings: CheckpointBenchmark, folder: Path) -> dict[str, list[Turn]]:
    checkpoint = replace(session.config.checkpoint, keep_last=1)
    managers: dict[str, CheckpointManager | None] = {
        name: CheckpointManager(
            folder / name,
            replace(checkpoint, asynchronous=name == _ASYNCHRONOUS),
            session.chunks,
            session.optimizer,
            session.checkpoints.scheduler,
        )
        for name in (_BLOCKING, _ASYNCHRONOUS)
    }
    managers[_NONE] = None
    batches = iter(session.loader(0))
    turns: dict[str, list[Turn]] = {name: [] for name in managers}
    step = 0
    for turn in range(settings.num_warmup + settings.num_repetitions):
        for name, manager in managers.items():
            found = _turn(session, manager, batches, step, settings.num_steps)
            step += settings.num_steps
            if turn >= settings.num_warmup:
                turns[name].append(found)
    return turns


def _turn(session: Session, manager: CheckpointManager | None, batches: Any, step: int, num_steps: int) -> Turn:
    device, stall = session.state.device, 0.0
    _synchronize(device)
    began = time.perf_counter()
    if manager is not None:
        meta = {"settings": flat_settings(session.config)}
        manager.save(step, meta, session.facts.tokenizer, session.facts.code)
        _synchronize(device)
        stall = time.perf_counter() - began
    for number in range(step + 1, step + 1 + num_steps):
        if manager is not None:
            asked = time.perf_counter()
            manager.poll()
            stall += time.perf_counter() - asked
        session.step(number, session.next_inputs(batches))
    _synchronize(device)
    whole = time.perf_counter() - began
    if manager is not None:
        manager.finish()  # outside of the turn, so that the next one starts from rest
    return Turn(stall, whole)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
