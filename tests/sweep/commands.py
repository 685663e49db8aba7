"""The real program on a tiny model, with facts and texts of its own, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from editeval.edits.journal import EditJournal
from editeval.files import read_jsonl, write_atomic
from tests.conftest import REPOSITORY

TEXT = "The sun rises in the east and sets in the west. After lunch the children went outside to play in the garden.\n"
CITIES = ("Lyon", "Turin", "Porto", "Ghent", "Bergen", "Graz", "Malmo", "Krakow", "Cork", "Varna", "Basel", "Tartu")


def facts(folder: Path) -> Path:
    """Write CounterFact rows about invented people; return the file."""
    rows = [
        {
            "case_id": number,
            "prompt": f"The home town of {name} is",
            "subject": name,
            "target_new": CITIES[(number + 5) % len(CITIES)],
            "ground_truth": CITIES[number],
            "rephrase_prompt": f"{name} grew up in the town of",
            "locality_prompt": f"The home town of {name[::-1].title()} is",
            "locality_ground_truth": CITIES[(number + 1) % len(CITIES)],
        }
        for number, name in enumerate(("Ada Brun", "Bo Carlin", "Cy Doran", "Di Evers", "Ed Falk", "Flo Gray", "Gus Holt", "Hal Ives"))
    ]
    path = folder / "facts.jsonl"
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True, kw_only=True)
class Program:
    """`launch.py` and `python -m editeval` on one folder of runs."""

    runs: Path
    cache: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = REPOSITORY

    def settings(self) -> list[str]:
        """The overrides of every launch: quick, quiet, and with nothing from outside."""
        folder = self.cache / "sweep-tests"
        file, text = facts(folder), folder / "text.txt"
        write_atomic(text, TEXT)
        return [
            "debug=tiny",
            "dataset=counterfact",
            "dataset.subset=easyedit",
            f"dataset.file={file}",
            "callback=silent",
            "logger=csv",
            "benchmark=[edit-quality,perplexity]",
            f"benchmark.perplexity.text_file={text}",
            f"paths.runs={self.runs}",
            f"paths.cache={self.cache}",
        ]

    def command(self, *arguments: str) -> list[str]:
        flags = [text for text in arguments if text.startswith("-")]  # Hydra wants flags and overrides apart
        overrides = [text for text in arguments if not text.startswith("-")]
        return [sys.executable, str(REPOSITORY / "launch.py"), *flags, *self.settings(), *overrides]

    def launch(self, *arguments: str, status: int = 0) -> str:
        return self.run(self.command(*arguments), status)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a launch and return at once; it leads a process group of its own."""
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            self.command(*arguments), cwd=self.cwd, env=self._environment(), stdout=quiet, stderr=quiet, start_new_session=True
        )

    def tool(self, *arguments: str, status: int = 0) -> str:
        return self.run([sys.executable, "-m", "editeval", *arguments], status)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(REPOSITORY), **self.environment}

    def run(self, command: list[str], status: int = 0) -> str:
        done = subprocess.run(command, cwd=self.cwd, env=self._environment(), capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    # -- what is on disk -------------------------------------------------------------------------------------------

    def folders(self) -> list[Path]:
        return sorted(path.parent for path in self.runs.glob("*/manifest.json"))

    def heads(self) -> dict[str, str]:
        """The last state of every run by the name of its folder."""
        return {folder.name: self.journal(folder).head for folder in self.folders()}

    @staticmethod
    def journal(folder: Path) -> EditJournal:
        return EditJournal.open(folder / "journal", genesis=json.loads((folder / "manifest.json").read_text())["edit_key"])

    def scores(self) -> dict[tuple[object, ...], float]:
        """Every value by run, rung, benchmark, what it was asked, metric and state; a measurement that was repeated must be equal."""
        found: dict[tuple[object, ...], float] = {}
        names = ("num_edits", "benchmark", "benchmark_key", "task", "metric", "protocol", "state_digest")
        for folder in self.folders():
            rows, _ = read_jsonl(folder / "scores.jsonl")
            for row in rows:
                key = (folder.name, *(row[name] for name in names))
                assert found.setdefault(key, row["value"]) == row["value"], key
        return found

    def edits_logged(self) -> int:
        return sum(len(read_jsonl(folder / "edits.jsonl")[0]) for folder in self.folders())
