"""A real single-node Slurm under one folder: started and stopped by process id, every wait bounded, nothing left behind.

Needs the programs of Debian's `slurm-wlm` and the rights of root; no systemd, no munge, no accounting.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
CALL_SECONDS = 20


def why_not() -> str | None:
    """Return why no Slurm can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine (apt-get install -y --no-install-recommends slurm-wlm)"
    return None if os.geteuid() == 0 else "starting slurmd needs root"


@dataclass
class Slurm:
    """The daemons and their folder; `environment` makes Slurm's programs talk to them."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        for name in ("state", "spool", "run", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "slurm.conf").write_text(_configuration(self.folder))
        self._daemon("slurmctld", "-c")
        self._daemon("slurmd")
        self.wait(lambda: self.call("sinfo", "--noheader", "--format=%T").strip() == "idle", "the node to be idle", seconds=60)

    def stop(self) -> None:
        try:
            if self.processes.get("slurmctld") is not None:
                self.call("scancel", "--user=root", "--full", check=False)
                self.call("scancel", "--user=root", check=False)
                self.wait(lambda: not self.call("squeue", "--noheader", check=False).strip(), "the queue to be empty", seconds=45)
        finally:
            for name in ("slurmd", "slurmctld"):
                self.kill(name, signal.SIGTERM)

    def kill(self, name: str, signal_number: int) -> None:
        """End a daemon; what it started goes on."""
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.send_signal(signal_number)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)

    def start_node(self) -> None:
        """Start slurmd again."""
        self._daemon("slurmd")

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=CALL_SECONDS, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def queue(self) -> dict[str, str]:
        """State of every job in the queue by id."""
        lines = self.call("squeue", "--array", "--noheader", "--format=%i|%T").splitlines()
        return dict(line.split("|") for line in lines if "|" in line)

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float) -> None:
        """Wait until a condition holds.

        Raises:
            TimeoutError: with the end of the daemons' logs.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in (self.folder / "log").iterdir())
                raise TimeoutError(f"waited {seconds} s for {what}\n{self.call('squeue', check=False)}\n{logs}")
            time.sleep(0.2)

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [name, "-D", *arguments, "-f", self.environment["SLURM_CONF"], "-L", str(self.folder / "log" / f"{name}.log")],
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _configuration(folder: Path) -> str:
    host = platform.node().split(".")[0]
    controller, node = _free_ports(2)
    return f"""
ClusterName=editeval
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,requeue_setup_env_fail
SlurmdParameters=config_overrides
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
InactiveLimit=0
KillWait=1
SlurmdTimeout=10
MinJobAge=3600
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
