"""`python -m editeval status | report | verify | export`: look at runs on disk, without editing anything."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from editeval.types import EditevalError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 a check failed, 2 wrong use)."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except EditevalError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is the command line
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m editeval", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    status = commands.add_parser("status", help="list the runs of a folder and how far each is")
    status.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of runs (default: runs)")
    status.set_defaults(command=_status)

    report = commands.add_parser("report", help="write the figures and the page of one run, or of every run of a folder")
    report.add_argument("run", type=Path, help="folder of a run, or a folder of runs")
    report.set_defaults(command=_report)

    verify = commands.add_parser("verify", help="replay a run's journal, check its digests, measure one rung again")
    verify.add_argument("run", type=Path, help="folder of a run")
    verify.add_argument("--rung", type=int, default=None, help="number of edits to measure again (default: the last rung)")
    verify.set_defaults(command=_verify)

    export = commands.add_parser("export", help="write an edited model as an ordinary Hugging Face folder")
    export.add_argument("run", type=Path, help="folder of a run")
    export.add_argument("--step", type=int, default=None, help="number of edits (default: all)")
    export.add_argument("--to", type=Path, required=True, help="new folder to write")
    export.set_defaults(command=_export)
    return parser


def _runs(folder: Path) -> list[Path]:
    if (folder / "manifest.json").exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not found:
        raise EditevalError(f"{folder} holds no runs; run `python launch.py` first, or name the folder of paths.runs")
    return found


def _status(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from editeval.edits.journal import EditJournal
    from editeval.runner.results import ScoreStore, read_manifest

    table = Table(title=f"Runs in {options.runs}")
    for column in ("run", "edits", "rungs measured", "scores", "state"):
        table.add_column(column, overflow="fold")
    for folder in _runs(options.runs):
        manifest = read_manifest(folder)
        with EditJournal.open(folder / "journal", genesis=manifest["edit_key"]) as journal:
            digests = {0: manifest["model_fingerprint"], **{step: journal.digest_at(step) for step in range(1, len(journal) + 1)}}
        scores = ScoreStore(folder).scores(digests)
        measured = sorted({score.num_edits for score in scores})
        wanted = _wanted_rungs(manifest["config"]["num_edits"])
        missing = [rung for rung in wanted if rung not in measured]
        state = "done" if not missing else f"missing rungs {', '.join(map(str, missing))}"
        table.add_row(folder.name, str(len(digests) - 1), ", ".join(map(str, measured)), str(len(scores)), state)
    Console().print(table)
    return 0


def _wanted_rungs(num_edits: int | list[int]) -> list[int]:
    return sorted({0, *(num_edits if isinstance(num_edits, list) else [num_edits])})


def _report(options: argparse.Namespace) -> int:
    from editeval.report.build import run_report

    for folder in _runs(options.run):
        files = run_report(folder)
        print(files.html)  # noqa: T201
    return 0


def _verify(options: argparse.Namespace) -> int:
    from editeval.revisit import verify

    found = verify(options.run, rung=options.rung)
    for difference in found.differences:
        print(f"DIFFERENT: {difference}")  # noqa: T201
    verdict = "verified" if found.passed else "NOT verified"
    print(  # noqa: T201
        f"{verdict}: {found.num_edits} edits replayed, {found.digests_compared} weight digests and "
        f"{found.scores_compared} scores of rung {found.rung} compared, {len(found.differences)} differences"
    )
    return 0 if found.passed else 1


def _export(options: argparse.Namespace) -> int:
    from editeval.revisit import export

    print(export(options.run, options.to, num_edits=options.step))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
