"""`python -m editeval COMMAND`: what is on disk, and what is left to do; `python -m editeval --help` lists the commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editeval.types import EditevalError

if TYPE_CHECKING:
    from omegaconf import DictConfig


QUERY_ROWS = 200  # lines of an answer that are shown
QUERY_WIDTH = 200  # characters a line where the output is no terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 a check failed, 2 wrong use)."""
    options = _options(arguments)
    try:
        status: int = options.command(options)
    except EditevalError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is the command line
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        advice = "; choose a folder that can be written" if getattr(options, "to", None) else ""
        print(f"error: {error.filename}: {error.strerror}{advice}", file=sys.stderr)  # noqa: T201
        return 2
    return status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides may stand anywhere, also behind an option, where argparse does not look for them."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    wrong = [text for text in left if text.startswith("-") or "=" not in text] if "overrides" in options else left
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m editeval", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    status = commands.add_parser("status", help="list the sweeps and runs of a folder and how far each is")
    status.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of runs (default: runs)")
    status.add_argument("--sweep", default=None, help="name of a sweep (default: every sweep, and the runs that belong to none)")
    status.add_argument("--all", action="store_true", help="a line for every job, also where there are many and they are done")
    status.add_argument("--no-queue", action="store_true", help="do not ask Slurm")
    status.set_defaults(command=_status)

    retry = commands.add_parser("retry", help="start the failed and missing jobs of a sweep again")
    retry.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of runs (default: runs)")
    retry.add_argument("--sweep", default=None, help="name of a sweep (default: the newest)")
    retry.add_argument("--no-queue", action="store_true", help="do not ask Slurm")
    retry.add_argument("overrides", nargs="*", default=[], help="overrides to add, such as hydra.launcher.timeout_min=600")
    retry.set_defaults(command=_retry)

    sync = commands.add_parser("sync", help="bring Weights & Biases up to what is on disk, each row exactly once")
    sync.add_argument("runs", type=Path, help="folder of a run, or a folder of runs")
    sync.add_argument("--project", default=None, help="W&B project (default: the run's logger.wandb.project)")
    sync.add_argument("--entity", default=None, help="W&B entity (default: the run's logger.wandb.entity)")
    sync.set_defaults(command=_sync)

    bisect = commands.add_parser("bisect", help="name the edit that broke a run's model")
    bisect.add_argument("run", type=Path, help="folder of a run")
    bisect.add_argument(
        "--max-norm-ratio", type=float, default=None, help="broken: an edited weight's norm is more than this times its unedited norm"
    )
    bisect.add_argument(
        "--max-canary-ratio",
        type=float,
        default=None,
        help="broken: the perplexity of plain sentences is more than this times the unedited",
    )
    bisect.set_defaults(command=_bisect)

    diff = commands.add_parser("diff", help="say where two runs differ: settings, edits, scores")
    diff.add_argument("a", type=Path, help="folder of a run")
    diff.add_argument("b", type=Path, help="folder of another run")
    diff.set_defaults(command=_diff)

    report = commands.add_parser("report", help="write the page and figures of one run; of many, one page over all of them")
    report.add_argument("runs", type=Path, nargs="+", help="folders of runs, or folders that hold them")
    report.add_argument(
        "--to",
        type=Path,
        default=None,
        help="folder to write (default: report/ in the first folder named; study/, if that is a run, which has a report/)",
    )
    report.add_argument("--each", action="store_true", help="of many runs, write each run's own page too")
    report.add_argument("--wandb", default=None, metavar="ENTITY/PROJECT", help="make a W&B report too (offline: its specification)")
    report.add_argument("--names", type=Path, default=None, help="pairs, families and aspects (default: editeval/report/studies.yaml)")
    report.set_defaults(command=_report)

    query = commands.add_parser("query", help="ask the scores and edits of all runs in SQL; without a question, list every score")
    query.add_argument("runs", type=Path, help="folder of a run, or a folder of runs")
    query.add_argument(
        "sql",
        nargs="?",
        default=None,
        help='such as "SELECT method, metric, protocol, avg(value) FROM scores GROUP BY ALL"; also: edits, runs',
    )
    query.add_argument("--to", type=Path, default=None, help="write the answer to a file too: .csv, .parquet or .json")
    query.set_defaults(command=_query)

    verify = commands.add_parser("verify", help="replay a run's journal, check its digests, measure one rung again")
    verify.add_argument("run", type=Path, help="folder of a run")
    verify.add_argument("--rung", type=int, default=None, help="number of edits to measure again (default: the last rung)")
    verify.set_defaults(command=_verify)

    export = commands.add_parser("export", help="write an edited model as an ordinary Hugging Face folder")
    export.add_argument("run", type=Path, help="folder of a run")
    export.add_argument("--step", type=int, default=None, help="number of edits (default: all)")
    export.add_argument("--to", type=Path, required=True, help="new folder to write")
    export.set_defaults(command=_export)

    doctor = commands.add_parser("doctor", help="say what a run will need (memory, disk, time) and what is missing, loading nothing")
    doctor.add_argument("overrides", nargs="*", default=[], help="settings, as on the command line of launch.py")
    doctor.add_argument("--offline", action="store_true", help="require that every file is on this machine, and list what is missing")
    doctor.set_defaults(command=_doctor)

    fetch = commands.add_parser("prefetch", help="fill a folder with all that a run reads, for machines without network")
    fetch.add_argument("overrides", nargs="*", default=[], help="settings, as on the command line of launch.py")
    fetch.add_argument("--to", type=Path, required=True, help="folder to fill; a stopped call is repeated")
    fetch.set_defaults(command=_prefetch)
    return parser


def _composed(overrides: list[str]) -> DictConfig:
    """Return the config of a command line of launch.py.

    Raises:
        EditevalError: it does not compose; one sentence.
    """
    from hydra import compose, initialize_config_dir

    from editeval.hydra_errors import CONF, is_about_settings, sentence

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config: DictConfig = compose("config", overrides=overrides)
    except Exception as error:
        if not is_about_settings(error):
            raise
        raise EditevalError(sentence(error, overrides)) from error
    return config


def _doctor(options: argparse.Namespace) -> int:
    # Before the hub's client is imported, which reads them once: the doctor fetches nothing, with or without --offline.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    config = _composed(options.overrides)
    from editeval.sweep.doctor import diagnose

    diagnosis = diagnose(config, offline=options.offline)
    print("\n".join(diagnosis.lines()))  # noqa: T201
    return 0 if diagnosis.ready else 1


def _prefetch(options: argparse.Namespace) -> int:
    config = _composed([*options.overrides, "paths.data=null"])
    from editeval.prefetch import prefetch
    from editeval.runner.progress import RichProgress

    found = prefetch(config, options.to.resolve(), RichProgress())
    print(f"{len(found.files)} files in {found.folder}, fetched now: {', '.join(found.fetched) or 'nothing'}")  # noqa: T201
    print(f"without network: python launch.py {' '.join([*options.overrides, *found.overrides])}")  # noqa: T201
    return 0


def _runs(folder: Path) -> list[Path]:
    if (folder / "manifest.json").exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not found:
        raise EditevalError(f"{folder} holds no runs; run `python launch.py` first, or name the folder of paths.runs")
    return found


def _status(options: argparse.Namespace) -> int:
    from editeval.sweep.show import show_status

    show_status(options.runs, sweep=options.sweep, everything=options.all, use_queue=not options.no_queue)
    return 0


def _retry(options: argparse.Namespace) -> int:
    from editeval.sweep.show import retry

    runs, more = options.runs, options.overrides
    if "=" in str(runs) and not runs.is_dir():  # `retry hydra.launcher.timeout_min=600`: an override where a folder may stand
        runs, more = Path("runs"), [str(runs), *more]
    return retry(runs, sweep=options.sweep, more=more, use_queue=not options.no_queue)


def _sync(options: argparse.Namespace) -> int:
    from editeval.sweep.sync import sync_run

    settings = {name: value for name in ("project", "entity") if (value := getattr(options, name)) is not None}
    failed = 0
    for folder in _runs(options.runs):
        try:
            print(f"{folder.name}: {sync_run(folder, **settings)} rows sent")  # noqa: T201
        except EditevalError as error:
            failed += 1
            print(f"{folder.name}: {error}", file=sys.stderr)  # noqa: T201
    return 1 if failed else 0


def _bisect(options: argparse.Namespace) -> int:
    from editeval.sweep.bisect import find_breaking_edit

    found = find_breaking_edit(options.run, max_norm_ratio=options.max_norm_ratio, max_canary_ratio=options.max_canary_ratio)
    print(found.sentence())  # noqa: T201
    return 0


def _diff(options: argparse.Namespace) -> int:
    from editeval.sweep.diff import compare

    lines = compare(options.a, options.b)
    print("\n".join(lines) if lines else "no difference in settings, edits and scores")  # noqa: T201
    return 1 if lines else 0


def _report(options: argparse.Namespace) -> int:
    from editeval.report.build import run_report
    from editeval.report.study import STUDIES_FILE
    from editeval.report.study_build import write_study

    folders = [folder for given in options.runs for folder in _runs(given)]
    if len(folders) == 1 and options.wandb is None:
        print(run_report(folders[0], to=options.to).html)  # noqa: T201
        return 0
    for folder in folders if options.each else []:
        print(run_report(folder).html)  # noqa: T201
    first = options.runs[0]
    to = options.to or first / ("study" if first in folders else "report")  # a run's own page stays
    files = write_study(folders, to, names=options.names or STUDIES_FILE, wandb=options.wandb)
    for verdict in files.verdicts:
        print(f"{verdict.key:6} {verdict.outcome:9} {verdict.reason}")  # noqa: T201
    print("\n".join(filter(None, (str(files.html), files.wandb))))  # noqa: T201
    return 0


def _query(options: argparse.Namespace) -> int:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from editeval.report.query import OVERVIEW, query

    answer = query(_runs(options.runs), options.sql or OVERVIEW, to=options.to)
    console = Console() if sys.stdout.isatty() else Console(width=QUERY_WIDTH)
    table = Table(*answer.columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in answer.rows[:QUERY_ROWS]:
        table.add_row(*(f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value) for value in row))
    console.print(table, markup=False)
    hidden = len(answer.rows) - QUERY_ROWS
    console.print(f"{len(answer.rows)} rows" + (f", {hidden} not shown: --to FILE.csv holds all" if hidden > 0 else ""))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from editeval.revisit import verify
    from editeval.types import counted

    found = verify(options.run, rung=options.rung)
    for difference in found.differences:
        print(f"DIFFERENT: {difference}")  # noqa: T201
    verdict = "verified" if found.passed else "NOT verified"
    print(  # noqa: T201
        f"{verdict}: {counted(found.rung, 'edit')} replayed, {counted(found.digests_compared, 'weight digest')} and "
        f"{counted(found.scores_compared, 'score')} of rung {found.rung} compared, {counted(len(found.differences), 'difference')}"
    )
    return 0 if found.passed else 1


def _export(options: argparse.Namespace) -> int:
    from editeval.revisit import export

    print(export(options.run, options.to, num_edits=options.step))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
