"""What a cluster does to jobs, done to ours on a real Slurm: each sweep must end as one that nothing happened to.

One trajectory is hit, the other must not notice. Times are never asserted: Slurm sends signals early and kills late.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.conftest import EDITS, Cluster, SameAsUnbroken

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]


def process_of(cluster: Cluster) -> int:
    """Return the process of the run that computed edits last."""
    found = [json.loads(path.read_text()) for path in (cluster.program.runs / ".jobs").glob("*.json")]
    running = [record for record in found if record["state"] == "running"]
    return int(max(running, key=lambda record: record["updated_at"])["process"]["pid"])


def test_a_sweep_outlives_its_submitter_and_a_job_killed_by_the_kernel_hides_no_other(
    cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken
) -> None:
    assert "they go on without this process" in cluster.submit(seeds="0,1")
    cluster.until_editing()
    os.kill(process_of(cluster), signal.SIGKILL)  # what the out-of-memory killer does
    cluster.until_over()
    status = cluster.status()
    assert "1 done, 1 failed" in status
    assert "_log.out" in status
    cluster.program.tool("retry", str(cluster.program.runs))
    cluster.until_over()
    assert "2 done" in cluster.status()
    assert cluster.program.edits_logged() == 2 * EDITS
    assert_same_as_unbroken(cluster.program)


def test_scancel_loses_no_edit(cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken) -> None:
    cluster.submit()
    cluster.until_editing()
    cluster.slurm.call("scancel", cluster.job())
    cluster.until_over()
    assert "1 failed" in cluster.status()
    cluster.program.tool("retry", str(cluster.program.runs))
    cluster.until_over()
    assert cluster.program.edits_logged() == EDITS
    assert_same_as_unbroken(cluster.program)


@pytest.mark.parametrize(
    "hit",
    [("scancel", "--signal=USR2"), ("scontrol", "requeue")],
    ids=["the signal before a time limit", "a requeue without a warning"],
)
def test_a_job_that_is_handed_in_again_continues(hit: tuple[str, str], cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken) -> None:
    cluster.submit()
    cluster.until_editing()
    cluster.slurm.call(*hit, cluster.job())
    cluster.until_over()
    assert "1 done" in cluster.status()
    assert launches(cluster) == 2
    assert cluster.program.edits_logged() == EDITS
    assert_same_as_unbroken(cluster.program)


def test_a_job_that_runs_out_of_its_time_hands_itself_in_again_and_continues(
    cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken
) -> None:
    cluster.submit("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=10")  # Slurm may say so a minute early
    cluster.until_editing()
    process = process_of(cluster)
    os.kill(process, signal.SIGSTOP)  # so slow that its minutes are not enough
    cluster.slurm.wait(lambda: is_asleep(process), "the process to be stopped", seconds=60)  # a busy one stops when it is next scheduled
    cluster.slurm.wait(lambda: not is_asleep(process), "the signal before the time limit", seconds=240)
    with suppress(ProcessLookupError):  # Slurm may have woken it itself
        os.kill(process, signal.SIGCONT)
    cluster.until_over(seconds=400)
    assert "1 done" in cluster.status()
    assert launches(cluster) >= 2
    assert cluster.program.edits_logged() == EDITS
    assert_same_as_unbroken(cluster.program)


def test_a_preempted_job_continues_when_the_other_has_gone(cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken) -> None:
    cluster.submit()
    cluster.until_editing()
    cluster.slurm.call("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    cluster.until_over()
    assert "1 done" in cluster.status()
    assert launches(cluster) == 2
    assert_same_as_unbroken(cluster.program)


def test_a_node_that_dies_and_comes_back_costs_nothing(cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken) -> None:
    cluster.submit()
    cluster.until_editing()
    cluster.slurm.kill("slurmd", signal.SIGKILL)
    os.kill(process_of(cluster), signal.SIGKILL)
    cluster.slurm.start_node()
    cluster.until_over()
    if "1 done" not in cluster.status():  # the controller hands it in again, or calls it failed: both are right
        cluster.program.tool("retry", str(cluster.program.runs))
        cluster.until_over()
    assert cluster.program.edits_logged() == EDITS
    assert_same_as_unbroken(cluster.program)


def test_an_exception_in_one_job_leaves_the_other_as_if_alone(cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken) -> None:
    cluster.submit("method.num_steps=200,0")  # 200 is what the unbroken sweep has
    cluster.until_over()
    status = cluster.status()
    assert "1 done, 1 failed" in status
    assert "num_steps" in status
    assert cluster.program.edits_logged() == EDITS
    assert_same_as_unbroken(cluster.program)


def test_two_jobs_on_one_trajectory_at_once_corrupt_nothing(cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken) -> None:
    cluster.submit("hydra.sweeper.skip_done=false")
    cluster.submit("hydra.sweeper.skip_done=false")
    assert len(cluster.slurm.queue()) == 2
    cluster.until_over()
    assert "1 done" in cluster.status()
    assert_same_as_unbroken(cluster.program)


def test_extra_jobs_for_width_wait_for_the_one_that_edits(cluster: Cluster, assert_same_as_unbroken: SameAsUnbroken) -> None:
    cluster.submit("hydra.sweeper.max_cells_per_job=3")
    assert len(cluster.slurm.queue()) == 2
    cluster.until_over()
    assert "2 done" in cluster.status()
    assert cluster.program.edits_logged() == EDITS
    assert_same_as_unbroken(cluster.program)


def test_jobs_that_the_queue_refuses_are_said_in_its_words(cluster: Cluster) -> None:
    output = cluster.submit("hydra.launcher.partition=nowhere", status=1)
    assert "error: slurm refuses the jobs" in output
    assert "nvalid partition" in output
    assert "Traceback" not in output
    assert "1 missing" in cluster.status()


def is_asleep(process: int) -> bool:
    """Whether a process is stopped and no USR2 waits for it."""
    try:
        lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":\t" in line)
    except OSError:
        return False
    return lines["State"].startswith("T") and not int(lines["ShdPnd"], 16) >> (signal.SIGUSR2 - 1) & 1


def launches(cluster: Cluster) -> int:
    (record,) = (cluster.program.runs / ".jobs").glob("*.json")
    return int(json.loads(record.read_text())["launches"])
