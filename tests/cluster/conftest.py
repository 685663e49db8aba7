"""One Slurm for all cluster tests, and the unbroken run that every broken one is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, why_not
from tests.sweep.commands import Program

EDITS = 8
# Slow enough to be hit in the middle: many steps over the published number of prefixes.
LADDER = (f"num_edits=[1,{EDITS}]", "method.num_steps=200", "method.prefix_lengths=[[5,10],[10,10]]")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A running single-node cluster."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Program:
    """The sweep's two trajectories as one process runs them when nothing happens."""
    program = Program(runs=tmp_path_factory.mktemp("unbroken"), cache=cache_dir)
    program.launch("-m", "seed=0,1", *LADDER)
    return program


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A sweep of two trajectories on the cluster, and what a test does to it."""

    slurm: Slurm
    program: Program

    def submit(self, *arguments: str, seeds: str = "0", status: int = 0) -> str:
        return self.program.launch(
            "-m",
            f"seed={seeds}",
            *LADDER,
            "hydra/launcher=slurm",
            "hydra.launcher.cpus_per_task=1",
            "hydra.launcher.signal_delay_s=30",
            *arguments,
            status=status,
        )

    def job(self, position: int = 0) -> str:
        """Return the id of a running or pending job."""
        return sorted(self.slurm.queue())[position]

    def until_editing(self, edits: int = 2) -> None:
        """Wait until a run has computed some edits but not all."""
        self.slurm.wait(lambda: self.program.edits_logged() >= edits, f"{edits} edits", seconds=120)

    def until_over(self, seconds: float = 240) -> None:
        """Wait until nothing is queued or running."""
        self.slurm.wait(lambda: not self.slurm.queue(), "the queue to be empty", seconds=seconds)

    def status(self) -> str:
        return self.program.tool("status", str(self.program.runs))


@pytest.fixture
def cluster(slurm: Slurm, cache_dir: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A fresh folder of runs on the cluster; the queue is emptied afterwards."""
    made = Cluster(slurm=slurm, program=Program(runs=tmp_path / "runs", cache=cache_dir, environment=slurm.environment))
    yield made
    slurm.call("scancel", "--user=root", check=False)
    slurm.wait(lambda: not slurm.queue(), "the queue to be empty", seconds=60)


SameAsUnbroken = Callable[[Program], None]


@pytest.fixture
def assert_same_as_unbroken(unbroken: Program) -> SameAsUnbroken:
    """Compare final states and every score with those of the same trajectories in the unbroken sweep."""

    def check(program: Program) -> None:
        heads, scores = unbroken.heads(), unbroken.scores()
        found = program.heads()
        assert found == {name: heads[name] for name in found}
        assert program.scores() == pytest.approx({key: value for key, value in scores.items() if key[0] in found}, abs=0, nan_ok=True)

    return check
