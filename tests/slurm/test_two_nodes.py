"""A run of two nodes under a real Slurm is stopped, requeued and resumed, and its curve is that of a run left alone.

Set SLURM_TRANSCRIPT to a file name to keep what was seen.
"""

import os
from pathlib import Path

import torch

from megatron_bitlm.training.trainer import pretrain
from tests.distributed_harness import run_ranks
from tests.slurm.cluster import NODES, wait_until
from tests.training_runs import read_metrics, run_config

NUM_STEPS = 100
TIMEOUT_S = 240  # a stage takes seconds; this is for a machine that does much else
SETTINGS = {"training__num_steps": NUM_STEPS, "checkpoint__interval_steps": 0, "training__progress": "lines"}
SETTINGS |= {"training__log_interval_steps": 25, "validation__interval_steps": 50}


def run_left_alone(directory: str, prefix: str) -> None:
    torch.set_num_threads(1)
    pretrain(run_config(directory, prefix, **SETTINGS))


def num_steps_done(directory: Path) -> int:
    file = directory / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_requeued_run_follows_the_uninterrupted_one(cluster, bitlm, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = Path("runs/two-nodes")
    run_config(directory, dataset, **SETTINGS)
    flags = ["--nodes", "2", "--gpus-per-node", "0", "--partition", "main", "--time", "10"]
    job = bitlm("slurm", "submit", "runs/two-nodes.yaml", *flags)
    logs = directory / "slurm"

    def story() -> str:
        texts = [f"--- {path}\n{path.read_text()}" for path in sorted(logs.glob(f"{job}-*.log"))]
        return "\n".join([cluster.run("squeue", "--all"), *texts, cluster.logs()])

    def state() -> str:
        return cluster.job(job)["JobState"]

    def restarts() -> int:
        assert state() not in ("FAILED", "COMPLETED", "CANCELLED"), story()
        return int(cluster.job(job)["Restarts"])

    seen = [f"submitted job {job}"]
    wait_until(lambda: num_steps_done(directory) >= 5, TIMEOUT_S, story)
    seen.append(f"running on {cluster.job(job)['NodeList']}: {cluster.run('sinfo', '--noheader', '--format=%N %t')}")

    # First what --signal=B:USR1@120 does two minutes before the time limit.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(restarts, TIMEOUT_S, story)
    first = num_steps_done(directory)
    seen.append(f"SIGUSR1 to the batch script: saved at step {first} and requeued by the script")
    assert first < NUM_STEPS
    assert (directory / "checkpoints" / "latest").read_text().strip() == f"step_{first:08d}"

    # Then what an administrator or a preemption does.
    wait_until(lambda: num_steps_done(directory) >= first + 5, TIMEOUT_S, story)
    earlier = restarts()
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: restarts() > earlier and state() != "COMPLETING", TIMEOUT_S, story)
    second = num_steps_done(directory)
    seen.append(f"scontrol requeue: saved at step {second}")
    assert first < second < NUM_STEPS

    wait_until(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED"), TIMEOUT_S, story)
    assert state() == "COMPLETED", story()
    batch = (logs / f"{job}-batch.log").read_text()
    # The script requeues what Slurm has not requeued already.
    assert batch.count("exit status 75") == batch.count("requeue\n") + 1 >= 2, batch
    assert batch.count("exit status 0") == 1, batch
    nodes = [(logs / f"{job}-{node}.log").read_text() for node in range(len(NODES))]
    for step in (first, second):
        line = f"resumed runs/two-nodes at step {step}"
        assert line in nodes[0] + nodes[1], story()
        seen.append(f"a node's log: {line}")
    seen += ["", f"$ cat runs/two-nodes/slurm/{job}-batch.log", batch]

    run_ranks(run_left_alone, 2, str(tmp_path / "alone"), dataset)
    requeued_curve, curve = read_metrics(directory), read_metrics(tmp_path / "alone")
    assert len(curve) == NUM_STEPS
    assert requeued_curve == curve
    seen.append(f"{NUM_STEPS} records equal those of the run left alone, bit for bit; last loss {curve[-1]['loss']!r}")
    if transcript := os.environ.get("SLURM_TRANSCRIPT"):
        Path(transcript).write_text("\n".join(seen) + "\n")


def test_a_cancelled_job_is_not_requeued(cluster, bitlm, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_config(Path("runs/cancelled"), dataset, **SETTINGS)
    job = bitlm("slurm", "submit", "runs/cancelled.yaml", "--nodes", "1", "--gpus-per-node", "0")
    log = Path(f"runs/cancelled/slurm/{job}-batch.log")
    wait_until(lambda: log.exists() and "start 0" in log.read_text(), TIMEOUT_S, cluster.logs)
    cluster.run("scancel", job)
    wait_until(
        lambda: cluster.job(job)["JobState"] == "CANCELLED" and "exit status" in log.read_text(),
        TIMEOUT_S,
        cluster.logs,
    )
    assert "requeue" not in log.read_text()
    assert cluster.job(job)["Restarts"] == "0"
