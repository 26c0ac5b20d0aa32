"""torchrun for one node of a job: stop signals, exit statuses and restarts that fit a long run.

torchrun itself ends its workers 30 seconds after a SIGTERM, dies of a SIGUSR1, exits with status 1 whatever its workers
said, and starts them again whatever they said. A run that is asked to stop needs time to save and has to say that it
can go on, and one that refuses its settings is not mended by another start, so this launcher

- sends SIGUSR1 and SIGTERM on to the workers and waits for them as long as they need,
- with `--max-restarts=N` starts the workers of all nodes again, from the newest checkpoint, when one dies; not when
  they were asked to stop, when the input was refused or when the training diverged,
- kills what is left of the workers some seconds after one of them has failed,
- exits with the status of the worker that ended first, where a worker failed.

    python -m megatron_bitlm.parallel.launch [OPTIONS OF TORCHRUN] -m megatron_bitlm.cli pretrain CONFIG.yaml

In a Slurm step, started once per node, it finds the number of nodes and its own place among them by itself.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher import api as launcher

from megatron_bitlm.errors import DIVERGED_EXIT_STATUS, HANG_EXIT_STATUS, STOP_EXIT_STATUS, BitLMError

_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# Another start would end as this one did.
_FINAL_STATUSES = (STOP_EXIT_STATUS, DIVERGED_EXIT_STATUS, BitLMError.exit_status)
# Ranks that wait for one that died cannot save, and may not even see it: a NCCL kernel waits for 30 minutes.
_KILL_AFTER_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the workers of this node; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = torchrun.parse_args([*slurm_options(os.environ), *arguments])
    if hasattr(options, "signals_to_handle"):  # of newer versions of torch; older ones take SIGTERM for themselves
        options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    # Else torch 2.13 gives workers that start again the key/value store of the first start, where gloo finds the
    # addresses of dead processes.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    received: list[signal.Signals] = []
    failed: dict[int, int] = {}
    # torchrun has no parameter for the class of its agent.
    launcher.LocalElasticAgent = functools.partial(Agent, received=received, failed=failed)  # type: ignore[misc]
    for number in _STOP_SIGNALS:
        signal.signal(number, _forwarder(received))
    try:
        torchrun.run(options)
    except ChildFailedError:
        print(f"{_describe(failed)}; the run ends", file=sys.stderr, flush=True)
        return exit_status(failed, received)
    except RendezvousConnectionError:
        if not received:
            raise
        # Another node has saved with this one, and was quicker to end.
        print("asked to stop, and the rendezvous has ended", file=sys.stderr)
        return STOP_EXIT_STATUS
    finally:
        for number in _STOP_SIGNALS:  # nothing may change the exit status any more
            signal.signal(number, signal.SIG_IGN)
        launcher.LocalElasticAgent = LocalElasticAgent  # type: ignore[misc]
    return 0


class Agent(LocalElasticAgent):
    """torchrun's agent of a node, that knows which ends of its workers are final.

    Args:
        received: Stop signals this process got; it adds none.
        failed: Filled with the exit status (-N: killed by signal N) by rank of the workers that failed first.
        others: As `LocalElasticAgent`.
    """

    def __init__(self, *args: Any, received: list[signal.Signals], failed: dict[int, int], **others: Any) -> None:
        super().__init__(*args, **others)
        self._received, self._failed = received, failed

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._failed.clear()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # torchrun is about to end the others, and afterwards cannot tell who was first.
        workers = [handler.proc for _, handler in sorted(self._pcontext.subprocess_handlers.items())]
        first = {worker_group.workers[i].global_rank: process.poll() for i, process in enumerate(workers)}
        self._failed.update({rank: status for rank, status in first.items() if status})
        if self._failed and STOP_EXIT_STATUS not in self._failed.values():
            killer = threading.Timer(_KILL_AFTER_S, lambda: [process.kill() for process in workers])
            killer.daemon = True
            killer.start()
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            if not self._failed:
                self._failed.update({rank: failure.exitcode for rank, failure in result.failures.items()})
            self._decide(worker_group)
        return result

    def _decide(self, worker_group: WorkerGroup) -> None:
        if self._received or any(status in _FINAL_STATUSES for status in self._failed.values()):
            self._remaining_restarts = 0
        if self._remaining_restarts > 0:
            most = worker_group.spec.max_restarts
            print(
                f"{_describe(self._failed)}; all workers start again from the newest checkpoint "
                f"(restart {most - self._remaining_restarts + 1} of {most})",
                file=sys.stderr,
                flush=True,
            )


def slurm_options(environment: Mapping[str, str]) -> list[str]:
    """torchrun's options that follow from Slurm's variables in a step with one task per node; none outside of one.

    Node 0 hosts the rendezvous; each requeue of a job has one of its own.
    """
    if "SLURM_PROCID" not in environment:
        return []
    job, attempt = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    return [
        f"--nnodes={environment['SLURM_STEP_NUM_NODES']}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={job}.{attempt}",
        f"--rdzv-conf=is_host={int(environment['SLURM_NODEID'] == '0')}",
    ]


def exit_status(failed: Mapping[int, int], received: Sequence[signal.Signals]) -> int:
    """Exit status of the node, given those of the workers that failed first by rank (-N: killed by signal N).

    A worker that a forwarded signal killed had not come as far as to install its handlers, so there is nothing to save
    and the run can go on where it was. A status that says what to do next counts before one that does not; the alarm
    that the watchdog sets for a process it cannot end itself says the same as its status.
    """
    statuses = [HANG_EXIT_STATUS if status == -signal.SIGALRM else status for status in failed.values()]
    if any(-status in received for status in statuses):
        return STOP_EXIT_STATUS
    for telling in (*_FINAL_STATUSES, HANG_EXIT_STATUS):
        if telling in statuses:
            return telling
    return statuses[0] if statuses[0] > 0 else 128 - statuses[0]


def _describe(failed: Mapping[int, int]) -> str:
    """Who failed; those killed first, as the others often fail for want of them."""
    killed = {rank: status for rank, status in failed.items() if status < 0}
    rank, status = next(iter((killed or failed).items()))
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    others = f" (and {len(failed) - 1} others failed)" if len(failed) > 1 else ""
    return f"rank {rank} {how}{others}"


def _forwarder(received: list[signal.Signals]) -> Callable[[int, FrameType | None], None]:
    def forward(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for worker in psutil.Process().children():
            try:
                worker.send_signal(number)
            except psutil.NoSuchProcess:
                continue  # it ended by itself in this moment

    return forward


if __name__ == "__main__":
    sys.exit(main())
