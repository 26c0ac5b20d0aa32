"""torchrun for one node of a job: passes stop signals on to the workers and keeps their exit status.

torchrun itself ends its workers 30 seconds after a SIGTERM, dies of a SIGUSR1, and exits with status 1 whatever its
workers said. A run that is asked to stop needs time to save and has to say that it can go on, so this launcher

- sends SIGUSR1 and SIGTERM on to the workers and waits for them as long as they need,
- exits with the status of the worker that ended first, where a worker failed.

    python -m megatron_bitlm.parallel.launch [OPTIONS OF TORCHRUN] -m megatron_bitlm.cli pretrain CONFIG.yaml

In a Slurm step, started once per node, it finds the number of nodes and its own place among them by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from megatron_bitlm.errors import STOP_EXIT_STATUS

_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the workers of this node; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = torchrun.parse_args([*slurm_options(os.environ), *arguments])
    if hasattr(options, "signals_to_handle"):  # of newer versions of torch; older ones take SIGTERM for themselves
        options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    received: list[signal.Signals] = []
    for number in _STOP_SIGNALS:
        signal.signal(number, _forwarder(received))
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended with exit status {failure.exitcode}", file=sys.stderr)
        return exit_status(failure.exitcode, received)
    except RendezvousConnectionError:
        if not received:
            raise
        # Another node has saved with this one, and was quicker to end.
        print("asked to stop, and the rendezvous has ended", file=sys.stderr)
        return STOP_EXIT_STATUS
    finally:
        for number in _STOP_SIGNALS:  # nothing may change the exit status any more
            signal.signal(number, signal.SIG_IGN)
    return 0


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


def exit_status(worker: int, received: Sequence[signal.Signals]) -> int:
    """Exit status of the node, given that of the worker that ended first (-N: killed by signal N).

    A worker that a forwarded signal killed had not come as far as to install its handlers, so there is nothing to save
    and the run can go on where it was.
    """
    if worker == STOP_EXIT_STATUS or -worker in received:
        return STOP_EXIT_STATUS
    return worker if worker > 0 else 128 - worker


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
