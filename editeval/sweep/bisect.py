"""Which edit broke the model: a search over the journal, without editing anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from editeval.edits.journal import EditJournal
from editeval.inference.edited import EditedModel
from editeval.revisit import load_edited
from editeval.runner.callbacks import Watchdog
from editeval.runner.run_files import JOURNAL_FOLDER, read_manifest
from editeval.types import EditevalError

DEFAULT_CANARY_RATIO = 10.0


@dataclass(frozen=True, kw_only=True)
class BreakingEdit:
    """The first edit found after which the model is broken (None: it never is), what is wrong then, and how many states were looked at.

    `what` is the limits where nothing is wrong.
    """

    step: int | None
    request_ids: tuple[str, ...]
    what: str
    num_edits: int
    looked_at: int

    def sentence(self) -> str:
        """Return the finding as one line."""
        if self.step is None:
            smaller = "--max-norm-ratio 2 or --max-canary-ratio 2 sees smaller damage"
            return f"none of the {self.num_edits} edits broke the model ({self.what}); {smaller}"
        return f"edit {self.step} of {self.num_edits} ({', '.join(self.request_ids)}) {self.what}; {self.looked_at} states were looked at"


def find_breaking_edit(run_dir: Path | str, *, max_norm_ratio: float | None = None, max_canary_ratio: float | None = None) -> BreakingEdit:
    """Return an edit before which the model is within the limits and after which it is not.

    Where a model recovers and breaks again this is one of several such edits. Without limits, non-finite weights and ten times the
    perplexity of plain sentences count as broken. Looks at about log2(edits) states, each rebuilt from the journal.

    Raises:
        EditevalError: the folder is no run, or its model is not the one that was edited.
    """
    if max_norm_ratio is None and max_canary_ratio is None:
        max_canary_ratio = DEFAULT_CANARY_RATIO
    try:
        watchdog = Watchdog(max_norm_ratio=max_norm_ratio, max_canary_ratio=max_canary_ratio)
    except ValueError as error:
        raise EditevalError(str(error)) from error
    model = load_edited(run_dir, num_edits=0)
    with EditJournal.open(Path(run_dir) / JOURNAL_FOLDER, genesis=read_manifest(run_dir)["edit_key"]) as journal:
        looked_at = 1
        good, bad = 0, len(journal)
        what = _what_is_broken(model, journal, bad, watchdog)
        if what is None:
            limits = {"max_norm_ratio": max_norm_ratio, "max_canary_ratio": max_canary_ratio}
            within = ", ".join(f"{name}={limit:g}" for name, limit in limits.items() if limit is not None)
            return BreakingEdit(step=None, request_ids=(), what=within, num_edits=len(journal), looked_at=looked_at)
        while bad - good > 1:
            middle = (good + bad) // 2
            looked_at += 1
            found = _what_is_broken(model, journal, middle, watchdog)
            if found is None:
                good = middle
            else:
                bad, what = middle, found
        entry = journal.entry(bad)
        return BreakingEdit(step=bad, request_ids=entry.request_ids, what=what, num_edits=len(journal), looked_at=looked_at)


def _what_is_broken(model: EditedModel, journal: EditJournal, num_edits: int, watchdog: Watchdog) -> str | None:
    if model.num_applied > num_edits:
        model.restore()
    for entry in journal.entries(model.num_applied, num_edits):
        model.apply(entry.edit)
    return watchdog.what_is_broken(model)
