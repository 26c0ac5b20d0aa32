"""Runs a function on several gloo ranks, one process each, as torchrun would start them."""

import contextlib
import io
import itertools
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# Imported once by the server that forks the ranks; importing megatron-core takes seconds.
_PRELOAD = ["torch", "megatron.core", "megatron_bitlm.model.backbone", "megatron_bitlm.parallel.state"]

_EXIT_TIMEOUT_S = 20


# Below the ports that outgoing connections get (from 32768 on Linux), so that none takes one between its choice and its
# use; each process counts on from a place of its own.
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000
_candidates = itertools.count(os.getpid() * 101)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment, another one at each call."""
    for candidate in itertools.islice(_candidates, _NUM_PORTS):
        port = _FIRST_PORT + candidate % _NUM_PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"none of {_NUM_PORTS} ports is free")


def run_ranks(function: Callable[..., T], world_size: int, *args: Any, timeout_s: float = 120) -> list[T]:
    """Calls `function(*args)` on every rank and returns the results in rank order.

    The function, importable by name, finds torchrun's variables in its environment and itself calls
    `initialize_parallel`. Results travel through `torch.save`.

    Raises:
        AssertionError: a rank failed (with its traceback) or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        # No daemons: saving a checkpoint starts a process of its own.
        process = context.Process(target=_rank_main, args=(sender, environment, function, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        results = _collect(pipes, timeout_s)
        for process in processes:
            process.join(timeout=_EXIT_TIMEOUT_S)
        return results
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} gave no result in {timeout_s} s"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failure, payload = pipe.recv()
            except EOFError as error:
                raise AssertionError(f"rank {rank} died without a word") from error
            assert failure is None, f"rank {rank} failed:\n{failure}"
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    sender: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)
        sender.send((None, buffer.getvalue()))
    except BaseException:
        sender.send((traceback.format_exc(), None))
