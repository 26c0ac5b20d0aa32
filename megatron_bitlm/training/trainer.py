"""The training loop: settings and data in, checkpoints and records out. It knows no model."""

from __future__ import annotations

import math
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bitlm import __version__
from megatron_bitlm.errors import BitLMError, DivergedError
from megatron_bitlm.model.build import describe_choices
from megatron_bitlm.model.checkpoint import complete_checkpoints
from megatron_bitlm.parallel.state import initialize_parallel, shutdown_parallel
from megatron_bitlm.training.anomalies import SkippedSteps
from megatron_bitlm.training.callbacks import Callback, MetricsFile, Progress, Record, TensorBoard
from megatron_bitlm.training.checkpoint_writing import told_by_rank_0
from megatron_bitlm.training.checks import check_run, data_identity
from megatron_bitlm.training.config import RunConfig, flat_settings
from megatron_bitlm.training.diagnosis import Diagnosis
from megatron_bitlm.training.flops import device_peak, run_flops
from megatron_bitlm.training.initial_weights import load_initial_weights
from megatron_bitlm.training.likelihood import LikelihoodReport
from megatron_bitlm.training.optimizer import gradient_norms_by_part
from megatron_bitlm.training.run_folder import RunFolder
from megatron_bitlm.training.session import Session
from megatron_bitlm.training.signals import StopRequest, true_on_any_rank
from megatron_bitlm.training.spikes import Rewinds, num_losses_needed, read_losses, spike_begins
from megatron_bitlm.training.step import StepResult
from megatron_bitlm.training.watchdog import Watchdog


@dataclass
class Outcome:
    """How a session of a run ended.

    Attributes:
        step: The last step.
        finished: The run is complete.
        validation: The last validation of the session.
        stopped: The session was asked by a signal to stop, saved and ended before its last step.
    """

    step: int
    finished: bool
    validation: LikelihoodReport | None
    stopped: bool = False


def pretrain(config: RunConfig) -> Outcome:
    """Train the run `config` describes, from its newest checkpoint if it has one. Under torchrun, call on every rank.

    Raises:
        BitLMError: Bad settings or data, or a folder that holds another run.
        DivergedError: Too many steps in a row whose loss or gradients are not finite, or too many rewinds.
    """
    with StopRequest() as stop:
        return _pretrain(config, stop)


def _pretrain(config: RunConfig, stop: StopRequest) -> Outcome:
    folder = RunFolder(config.run.directory)
    facts = check_run(config, folder)
    state = initialize_parallel(config.parallel, seed=config.run.seed, model=config.model.resolve_backbone())
    with Watchdog(config.watchdog, folder.stacks / f"rank_{state.rank}.txt", state.rank) as watchdog:
        try:
            session = Session(config, facts, state, folder.checkpoints)
            if state.is_main:
                folder.claim(config)
            callbacks = _callbacks(config, folder) if state.is_main else []
            with closing(session):
                return Loop(session, folder, callbacks, stop, watchdog).run()
        finally:
            watchdog.phase("end")
            shutdown_parallel()
            folder.release()


def _callbacks(config: RunConfig, folder: RunFolder) -> list[Callback]:
    watching: list[Callback] = [MetricsFile(folder.metrics_file), TensorBoard(folder.tensorboard)]
    if config.training.progress != "off":
        watching.append(Progress(config.training.progress, config.training.log_interval_steps))
    return watching


class Loop:
    """Runs the steps of a session.

    Args:
        session: Model, data and optimizer.
        folder: The run's folder.
        callbacks: Told of every step (on the main process).
        stop: Asked before every step whether to end the session there.
        watchdog: Told of every step, validation and checkpoint.
    """

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        callbacks: list[Callback],
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.session, self.folder, self.callbacks, self.stop = session, folder, callbacks, stop
        self.watchdog = watchdog
        config, facts = session.config, session.facts
        flops = run_flops(config, facts.card.vocab_size).total
        peak = device_peak(config, session.state.device)
        self.tokens_per_step = config.training.global_batch_size * config.data.sequence_length
        self.flops_share = flops * self.tokens_per_step / (peak * session.state.world_size) if peak else None
        self.validation: LikelihoodReport | None = None
        self.initial: Path | None = None
        self.skipped = SkippedSteps(config.anomalies.max_consecutive_skips)
        self.rewinds = Rewinds()
        self.losses: list[float] = []  # of the steps that were not skipped, on the main process

    def run(self) -> Outcome:
        """Resume, train to the end of the session, leave a checkpoint; as often as the run is rewound."""
        config = self.session.config
        last = min(config.training.num_steps, config.training.stop_after_steps or config.training.num_steps)
        try:
            while True:
                self.watchdog.phase("start")
                start = self._resume()
                reached, target = self._train(start, last)
                if target is None:
                    break
                self._rewind(reached, target)
            self.watchdog.phase("end")
            self.session.checkpoints.finish()
        except BaseException:
            self.session.checkpoints.finish_after_error()
            raise
        finished = last == config.training.num_steps and reached >= last
        return Outcome(reached, finished, self.validation, stopped=reached < last)

    def _train(self, start: int, last: int) -> tuple[int, int | None]:
        """The steps after `start`; returns the last one done, and the step to go back to where there was a spike."""
        step, batches = start, None
        try:
            for callback in self.callbacks:
                callback.on_start(start, last)
            self._announce(start)
            while True:
                target = self._rewind_target(step)
                if target is not None or step >= last:
                    return step, target
                if self.stop.agreed(self.session.state.device):
                    self._stop_at(step, start)
                    return step, None
                step += 1
                skipped = self.rewinds.skipped_samples(step)
                if batches is None or skipped != self.rewinds.skipped_samples(step - 1):
                    consumed = (step - 1) * self.session.config.training.global_batch_size + skipped
                    batches = iter(self.session.loader(consumed, skipped))
                self._one_step(step, batches, last)
                self.watchdog.phase("step")
        finally:
            for callback in self.callbacks:
                callback.on_end()

    def _rewind_target(self, step: int) -> int | None:
        """The step to go back to, where a spike of the loss was seen at `step` and something can be done. Collective.

        Raises:
            DivergedError: The run has gone back often enough.
        """
        settings = self.session.config.anomalies
        spike = settings.spike_action != "off" and spike_begins(self.losses, settings)
        if spike:
            self._warn(f"step {step}: the loss has been far above the usual for {settings.spike_patience_steps} steps")
        if settings.spike_action != "rewind" or not true_on_any_rank(spike, self.session.state.device):
            return None
        if len(self.rewinds.entries) >= settings.max_rewinds:
            raise DivergedError(
                f"step {step}: the loss jumped again after {len(self.rewinds.entries)} rewinds (anomalies.max_rewinds "
                f"{settings.max_rewinds}); the checkpoints of {self.folder.path} are kept: start another run.directory "
                "with a lower optimizer.learning_rate or other data"
            )
        self.watchdog.phase("checkpoint")
        self.session.checkpoints.finish()
        before = step - settings.spike_patience_steps
        found = [known for known, _ in complete_checkpoints(self.folder.checkpoints) if known <= before]
        target = told_by_rank_0(max(found, default=None))
        if target is None:
            self._warn(f"step {step}: no checkpoint before the spike to go back to; training goes on")
        self.watchdog.phase("step")
        return target

    def _rewind(self, step: int, target: int) -> None:
        """Write down that the run goes back from `step` to the checkpoint `target`; `_resume` does it, now or later."""
        if not self.session.state.is_main:
            return
        entry = self.rewinds.add(step, target, self.session.config.training.global_batch_size)
        number = len(self.rewinds.entries)
        self.folder.copy_rewound_metrics(number, target)
        self.rewinds.write(self.folder.rewinds_file)
        self._warn(
            f"rewind {number}: from step {step} back to the checkpoint of step {target}, without the data between "
            f"({entry.skipped_samples} samples skipped so far); {self.folder.rewinds} keeps the records"
        )

    def _stop_at(self, step: int, start: int) -> None:
        if step > start:
            self._save(step)
        for callback in self.callbacks:
            callback.on_message(f"asked to stop: {self.folder.path} stops at step {step} and can be resumed")

    def _one_step(self, step: int, batches: Any, last: int) -> None:
        config = self.session.config
        self.session.checkpoints.poll()
        began = time.perf_counter()
        inputs = self.session.next_inputs(batches)
        result = self.session.step(step, inputs)
        norms = {}
        if result.diagnosis is None:
            norms = gradient_norms_by_part(self.session.optimizer, result.gradient_norm)
        seconds = time.perf_counter() - began
        self.skipped.count(result.diagnosis is not None)
        record = self._record(step, result, norms, seconds)
        # Not at the end of a session that stops early: a run's records do not depend on its sessions.
        if _is_due(step, config.validation.interval_steps) or step == config.training.num_steps:
            self.watchdog.phase("validation")
            self.validation = self.session.validate()
            record |= self.validation.record()
        for callback in self.callbacks:
            callback.on_step(record)
        if result.diagnosis is not None:
            self._report_skip(result.diagnosis)
        elif self.session.state.is_main:
            self.losses = [*self.losses[-num_losses_needed(config.anomalies) :], result.metrics.loss]
        if _is_due(step, config.checkpoint.interval_steps) or step == last:
            self._save(step)

    def _report_skip(self, diagnosis: Diagnosis) -> None:
        path = self.folder.diagnostics / f"step_{diagnosis.step}.json"
        if self.session.state.is_main:
            diagnosis.write(path)
        self._warn(f"skipped, no weight was changed: {diagnosis.sentence()}; see {path}")
        if self.skipped.too_many:
            dist.barrier()  # the first rank to end may have the others killed
            raise self.skipped.diverged(diagnosis, str(path))

    def _save(self, step: int) -> None:
        self.watchdog.phase("checkpoint")
        self.session.complete_weights()
        self.session.checkpoints.save(step, self._meta(), self.session.facts.tokenizer, self.session.facts.code)

    def _record(self, step: int, result: StepResult, norms: dict[str, float], seconds: float) -> Record:
        figures = {**result.metrics.record(), "gradient_norm": result.gradient_norm, **norms}
        record: Record = {
            "step": step,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},  # JSON has no NaN
            "skipped_steps": self.skipped.total,
            "skipped_samples": self.rewinds.skipped_samples(step),
            "learning_rate": result.learning_rate,
            "samples": step * self.session.config.training.global_batch_size,
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": self.tokens_per_step / seconds,
            "seconds": seconds,
        }
        if self.flops_share is not None:
            record["mfu"] = self.flops_share / seconds
        return record

    def _resume(self) -> int:
        """Load the newest checkpoint of the run's history and cut the records behind it; returns its step."""
        if self.session.state.is_main:
            self.rewinds = Rewinds.read(self.folder.rewinds_file)
            self.rewinds.set_abandoned_aside(self.folder.checkpoints)
        self.rewinds = told_by_rank_0(self.rewinds)
        meta = self.session.checkpoints.load_latest(self._warn)
        step = int(meta["step"]) if meta else 0
        self.skipped = SkippedSteps(self.session.config.anomalies.max_consecutive_skips)
        if meta is None:
            self.initial = load_initial_weights(self.session.config, self.session.chunks, self.session.optimizer)
        if meta is not None and "skipped_steps" in meta:  # checkpoints of the first versions have none
            self.skipped.restore(meta["skipped_steps"])
        if meta is not None and len(meta.get("rewinds", [])) > len(self.rewinds.entries):
            raise BitLMError(
                f"the checkpoint of step {step} comes after {len(meta['rewinds'])} rewinds, but "
                f"{self.folder.rewinds_file} tells of {len(self.rewinds.entries)}; restore that file"
            )
        if self.session.state.is_main:
            self.folder.keep_metrics_through(step)
            self.losses = read_losses(self.folder.metrics_file)
        return step

    def _warn(self, text: str) -> None:
        if self.session.state.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _announce(self, start: int) -> None:
        config = self.session.config
        training, device = config.training, self.session.state.device
        lines = [describe_choices(config.model, device, training.precision, training.fp8)]
        if self.initial is not None:
            lines.append(f"starts from the weights of {self.initial}")
        if start:
            lines.append(f"resumed {self.folder.path} at step {start}")
        for callback in self.callbacks:
            for line in lines:
                callback.on_message(line)

    def _meta(self) -> dict[str, Any]:
        config = self.session.config
        return {
            "data": data_identity(self.session.facts),
            "settings": flat_settings(config),
            "package_version": __version__,
            "skipped_steps": self.skipped.state(),
            "rewinds": self.rewinds.state(),
        }


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
