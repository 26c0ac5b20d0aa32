"""What each rank runs for the traps of megatron-core: two training steps, with an eye on their insides."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_bitlm.parallel.state import initialize_parallel, shutdown_parallel
from megatron_bitlm.training.checks import check_run
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.optimizer import gradient_norms_by_part
from megatron_bitlm.training.run_folder import RunFolder
from megatron_bitlm.training.session import Session

NUM_STEPS = 2


@dataclass
class Seen:
    """What one rank saw."""

    loss: list[float] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)  # as the loss function handed them to megatron-core
    sums_alias_the_loss: bool = False
    head_flags: dict[str, bool] = field(default_factory=dict)  # parameter: is its gradient summed over tensor ranks
    parameter_names: list[str] = field(default_factory=list)
    group_dtypes: list[set[torch.dtype]] = field(default_factory=list)
    group_keys: list[tuple] = field(default_factory=list)
    buffer_dtypes: list[set[tuple[torch.dtype, torch.dtype]]] = field(default_factory=list)  # by model chunk
    float_buffers: list[str] = field(default_factory=list)
    head_input_dtypes: list[torch.dtype] = field(default_factory=list)  # noisy codes and times
    schedule: dict[str, Any] = field(default_factory=dict)
    draw: torch.Tensor | None = None
    bit_layers: dict[str, type] = field(default_factory=dict)


def watch_all(ports: list[int], configs: list[RunConfig], sprung: list[bool]) -> list[Seen]:
    """`watch` for every configuration on these ranks."""
    results = []
    for port, config, spring in zip(ports, configs, sprung, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        results.append(watch(config, spring))
    return results


@contextlib.contextmanager
def open_session(config: RunConfig) -> Iterator[tuple[Session, torch.Tensor]]:
    """The session of a run that writes nothing, and what torch drew before it."""
    folder = RunFolder(config.run.directory)
    facts = check_run(config, folder)
    state = initialize_parallel(config.parallel, seed=config.run.seed)
    try:
        draw = torch.rand(4)
        yield Session(config, facts, state, folder.checkpoints), draw
    finally:
        shutdown_parallel()


def watch(config: RunConfig, spring: bool = False) -> Seen:
    """Train two steps; `spring` takes the marks off the head's parameters."""
    torch.set_num_threads(1)
    with open_session(config) as (session, draw):
        seen = Seen(draw=draw)
        for chunk in session.chunks:
            _look_at(chunk, seen, spring)
        _look_at_optimizer(session, seen)
        _listen_to_the_loss(session, seen)
        batches = iter(session.loader(0))
        for step in range(1, NUM_STEPS + 1):
            result = session.step(step, session.next_inputs(batches))
            seen.loss.append(result.metrics.loss)
            norms = gradient_norms_by_part(session.optimizer, result.gradient_norm)
            seen.norms.append({"gradient_norm": result.gradient_norm, **norms})
        return seen


def _look_at(chunk: torch.nn.Module, seen: Seen, spring: bool) -> None:
    seen.parameter_names += [name for name, _ in chunk.named_parameters()]
    seen.float_buffers += [name for name, buffer in chunk.named_buffers() if buffer.is_floating_point()]
    config = chunk.config
    for name in ("deallocate_pipeline_outputs", "overlap_p2p_comm", "batch_p2p_comm", "calculate_per_token_loss"):
        seen.schedule[name] = getattr(config, name)
    if chunk.pre_process:
        seen.bit_layers["input"] = type(chunk.input_module.fc1)
    if not chunk.post_process:
        return
    head = chunk.head
    seen.bit_layers |= {"head input": type(head.input), "head output": type(head.output)}
    for name, parameter in head.named_parameters():
        seen.head_flags[name] = bool(parameter.sequence_parallel)
        if spring:
            parameter.sequence_parallel = False

    def note(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.head_input_dtypes += [inputs[0].dtype, inputs[1].dtype]

    head.register_forward_pre_hook(note)


def _look_at_optimizer(session: Session, seen: Seen) -> None:
    for part in getattr(session.optimizer, "chained_optimizers", [session.optimizer]):
        if hasattr(part, "model_float16_groups"):  # the optimizer's own groups hold fp32 copies
            pairs = zip(part.model_float16_groups, part.model_fp32_groups, strict=True)
            groups = [[*half, *full] for half, full in pairs]
        else:
            groups = [group["params"] for group in part.optimizer.param_groups]
        seen.group_dtypes += [{parameter.dtype for parameter in group} for group in groups]
    seen.group_keys = [
        (group["wd_mult"], group["lr_mult"], group["is_expert_parallel"], group["is_decoupled_lr"])
        for group in session.optimizer.param_groups
    ]
    for chunk in session.wrapped:
        seen.buffer_dtypes.append({(buffer.param_dtype, buffer.grad_dtype) for buffer in chunk.buffers})


def _listen_to_the_loss(session: Session, seen: Seen) -> None:
    runner = session.step.runner
    original = runner.run

    def run(inputs: list, objective: Any, loss_function: Any, **options: Any) -> list:
        def listen(scored: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
            total, count, reported = loss_function(scored)
            seen.counts.append(count.clone())
            before = reported.sums.clone()
            with torch.no_grad():
                total.add_(1.0)  # megatron-core divides it in place
                seen.sums_alias_the_loss |= not torch.equal(reported.sums, before)
                total.sub_(1.0)
            return total, count, reported

        return original(inputs, objective, listen, **options)

    runner.run = run
