"""A real Slurm of two nodes on one machine, from Debian's packages: one slurmctld, a slurmd per node, munge.

Everything lives in one folder and on ports of 127.0.0.1, and ends with the context. Run this file to look around:
`python -m tests.slurm.cluster` starts the cluster and a shell in its environment.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.distributed_harness import free_port

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
# Jobs of two clusters on this machine must not agree on a rendezvous.
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its last start are void: cred_expire seconds, at least 5.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=60
SwitchType=switch/none
MpiDefault=none
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not() -> str | None:
    """What keeps Slurm from running here, after trying to install it; None where it can run."""
    if os.geteuid() != 0:
        return "needs root: Slurm's daemons run under one user here, and munge wants that to be root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} are not installed, and there is no apt-get to install {' '.join(PACKAGES)} with"
    if missing:
        _install()
    return None


def _install() -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with open(Path(tempfile.gettempdir()) / "bitlm-slurm-install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes want the same
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            result = subprocess.run(
                ["apt-get", "--quiet", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, f"apt-get {' '.join(command)} failed:\n{result.stdout}\n{result.stderr}"


class SlurmCluster:
    """Context manager; `environment` is what Slurm's commands need to find this cluster.

    Args:
        cpus_per_node: Cores that each node claims to have.
    """

    def __init__(self, cpus_per_node: int = 1) -> None:
        self.cpus_per_node = cpus_per_node
        # Not under pytest's folders: munge insists on parents that only root can write to.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            wait_until(self._all_idle, 60, self.logs)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}\n{self.logs()}"
        return result.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, by its own names."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The daemons' last words."""
        return "".join(f"--- {path.name}\n{path.read_text()[-3000:]}\n" for path in sorted(self.folder.glob("*.log")))

    def _configure(self) -> None:
        self.folder.chmod(0o755)
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        ports = [free_port() for _ in range(1 + len(NODES))]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // (2 * len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus_per_node} "
            f"RealMemory={memory} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = _CONF.format(
            host=host,
            controller_port=ports[0],
            first_job=20 * (ports[0] % 500) + 1,
            folder=self.folder,
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {name: f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")}
        self._start("munged", "--foreground", f"--socket={folder / 'socket'}", *files.values())
        wait_until((folder / "socket").exists, 20, self.logs)

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}-{len(self._daemons)}.out.log", "w") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self._daemons.append(process)

    def _all_idle(self) -> bool:
        dead = [process.args for process in self._daemons if process.poll() is not None]
        assert not dead, f"{dead} ended\n{self.logs()}"
        result = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%t"], env=self.environment, capture_output=True, text=True
        )
        return result.stdout.split() == ["idle"] * len(NODES)

    def _stop(self) -> None:
        """Jobs first, then the daemons, munge last."""
        if len(self._daemons) > 1:
            subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=self.environment, check=False)
            subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
        for process in reversed(self._daemons):
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_until(condition: Callable[[], Any], timeout_s: float, report: Callable[[], str]) -> Any:
    """The condition's value once it is true; fails with the report when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s\n{report()}"
        time.sleep(0.1)
    return value


if __name__ == "__main__":
    reason = why_not()
    if reason:
        raise SystemExit(reason)
    with SlurmCluster() as cluster:
        subprocess.run([os.environ.get("SHELL", "bash")], env=cluster.environment, check=False)
