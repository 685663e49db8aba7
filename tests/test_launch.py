"""The command line as a person uses it: the real program in a process of its own, on a tiny model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from editeval.edits.journal import EditJournal
from editeval.files import read_jsonl
from editeval.runner.results import ScoreStore
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.xdist_group("launch")  # they share one finished run

TINY = ("debug=tiny",)


def command(runs: Path, cache: Path, *arguments: str) -> list[str]:
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if not any(argument.startswith("benchmark=") for argument in overrides):
        overrides.append("benchmark.quick.limit=8")
    return [sys.executable, "launch.py", *flags, *TINY, f"paths.runs={runs}", f"paths.cache={cache}", *overrides]


def launch(runs: Path, cache: Path, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(command(runs, cache, *arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/manifest.json"))


def run_folder(runs: Path) -> Path:
    (folder,) = runs_in(runs)
    return folder


def journal_of(run: Path) -> EditJournal:
    return EditJournal.open(run / "journal", genesis=json.loads((run / "manifest.json").read_text())["edit_key"])


def scores_of(run: Path) -> dict[tuple[object, ...], float]:
    """Every score of a whole cell; lines that a kill tore do not count."""
    return {(s.num_edits, s.benchmark, s.task, s.metric, s.protocol, s.state_digest): s.value for s in ScoreStore(run).scores()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> tuple[Path, str]:
    """One unbroken tiny run and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    return run_folder_after(runs, cache_dir)


def run_folder_after(runs: Path, cache: Path) -> tuple[Path, str]:
    output = launch(runs, cache)
    return run_folder(runs), output


def test_a_run_ends_with_scores_a_table_a_picture_and_a_page(finished: tuple[Path, str]) -> None:
    run, output = finished
    rungs = {key[0] for key in scores_of(run)}
    assert rungs == {0, 1, 3}
    assert "efficacy" in output
    assert str(run) in output.replace("\n", "")
    page = next(run.rglob("*.html")).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="http' not in page
    assert next(run.rglob("*.png")).stat().st_size > 10_000


def test_every_edit_changed_the_weights(finished: tuple[Path, str]) -> None:
    rows, _ = read_jsonl(finished[0] / "edits.jsonl")
    digests = [row["weights_digest"] for row in rows]
    assert len(digests) == 3
    assert len(set(digests)) == 3


def test_a_second_run_edits_and_measures_nothing(finished: tuple[Path, str], cache_dir: Path) -> None:
    run, _ = finished
    before = {path: path.stat().st_size for path in (run / "journal").iterdir()}
    scores, edits = (run / "scores.jsonl").read_bytes(), (run / "edits.jsonl").read_bytes()
    output = launch(run.parent, cache_dir)
    assert "efficacy" in output
    assert {path: path.stat().st_size for path in (run / "journal").iterdir()} == before
    assert (run / "scores.jsonl").read_bytes() == scores
    assert (run / "edits.jsonl").read_bytes() == edits


def test_swept_rungs_and_a_list_of_rungs_give_identical_scores(finished: tuple[Path, str], cache_dir: Path, tmp_path: Path) -> None:
    launch(tmp_path, cache_dir, "-m", "num_edits=1,3")
    swept = run_folder(tmp_path)
    listed = scores_of(finished[0])
    for key, value in scores_of(swept).items():
        if key[0] != 0:  # the unedited model's edit quality is over the facts of the largest rung, which differs between the jobs
            assert value == pytest.approx(listed[key], nan_ok=True, abs=0), key


def test_jobs_of_one_process_do_not_leak_into_each_other(cache_dir: Path, tmp_path: Path) -> None:
    launch(tmp_path / "together", cache_dir, "-m", "seed=1,2", "num_edits=1", "benchmark=[edit-quality]")
    for seed in (1, 2):
        launch(tmp_path / "alone", cache_dir, f"seed={seed}", "num_edits=1", "benchmark=[edit-quality]")
    heads = {place: {path.name: journal_of(path).head for path in runs_in(tmp_path / place)} for place in ("together", "alone")}
    assert heads["together"] == heads["alone"]
    assert len(heads["alone"]) == 2


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_instants_ends_like_an_unbroken_one(
    finished: tuple[Path, str], cache_dir: Path, tmp_path: Path
) -> None:
    unbroken = finished[0]
    instants = random.Random(7)
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            command(tmp_path, cache_dir), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(instants.uniform(3.0, 12.0))
        finished_first = process.poll() is not None
        if not finished_first:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if finished_first:
            remove_something(run_folder(tmp_path), instants)
    launch(tmp_path, cache_dir)
    resumed = run_folder(tmp_path)
    assert journal_of(resumed).head == journal_of(unbroken).head
    assert set(scores_of(resumed)) == set(scores_of(unbroken))
    assert scores_of(resumed) == pytest.approx(scores_of(unbroken), nan_ok=True, abs=0)


def remove_something(run: Path, instants: random.Random) -> None:
    """Take a finished run back to an earlier instant, so that the next kill has something to interrupt."""
    scores = run / "scores.jsonl"
    content = scores.read_bytes()
    scores.write_bytes(content[: instants.randrange(len(content))])
    segment = sorted((run / "journal").iterdir())[-1]
    content = segment.read_bytes()
    segment.write_bytes(content[: instants.randrange(len(content))])


def test_a_damaged_journal_is_refused_by_name(finished: tuple[Path, str], cache_dir: Path, tmp_path: Path) -> None:
    launch(tmp_path, cache_dir, "num_edits=2", "benchmark=[edit-quality]")
    run = run_folder(tmp_path)
    segment = sorted((run / "journal").iterdir())[0]
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(bytes(data))
    output = launch(tmp_path, cache_dir, "num_edits=3", "benchmark=[edit-quality]", status=1)
    assert "error:" in output
    assert segment.name in output.replace("\n", "")
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("method=romee",), "method has no option 'romee'; did you mean 'rome'?"),
        (("benchmark=[quik]",), "benchmark has no option 'quik'; did you mean 'quick'?"),
        (("method.layr=3",), "no setting 'method.layr'; did you mean 'layer'?"),
        (("method.layer=",), "method.layer='' must be int or null"),
        (("dataset.known_only=yes",), "dataset.known_only='yes' must be bool"),
        (("method.layer=40",), "layer 40 not in 0..3"),
        (("num_edits=-1",), "num_edits"),
        (("num_edits=100000",), "num_edits"),
        (("batch_size=0",), "batch_size"),
        (("prepare_only=no_",), "prepare_only='no_' must be true or false"),
        (("logger=null",), "logger=null is not possible; for none write logger=[]"),
        (("batch_size=3",), "writes at most 1 fact"),
        (("dataset=counterfact", "paths.data=/nowhere"), "/nowhere"),
        (("model=pretrained", "model.name_or_path=/no/such/model"), "/no/such/model"),
    ],
)
def test_bad_input_is_one_clear_sentence_before_any_weights(
    arguments: tuple[str, ...], expected: str, cache_dir: Path, tmp_path: Path
) -> None:
    output = launch(tmp_path, cache_dir, *arguments, status=1)
    assert expected in output
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*/journal"))


def test_prepare_only_fills_the_cache_and_makes_no_run(tmp_path: Path) -> None:
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    output = launch(runs, cache, "prepare_only=true")
    assert "method rome is ready for tiny-llama" in output
    assert str(cache) in output
    assert list((cache / "covariance-factor").glob("*.safetensors"))
    assert runs_in(runs) == []


@pytest.mark.parametrize("flag", [("--help",), ("--cfg", "job")])
def test_help_and_config_need_no_heavy_import(flag: tuple[str, ...]) -> None:
    code = (
        "import sys, runpy; sys.argv = ['launch.py', *sys.argv[1:]]\n"
        "try:\n    runpy.run_path('launch.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'lightning', 'wandb', 'lm_eval', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *flag], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "num_edits" in done.stdout


def test_a_run_is_verified_exported_and_listed(finished: tuple[Path, str], tmp_path: Path) -> None:
    run = finished[0]

    def tool(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "editeval", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "verified: 3 edits replayed, 3 weight digests" in tool("verify", str(run))
    assert "done" in tool("status", str(run.parent))
    tool("export", str(run), "--step", "2", "--to", str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert (tmp_path / "exported" / "tokenizer.json").exists()
