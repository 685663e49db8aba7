"""Progress, watchdog, timing and edit log, driven as the runner drives them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from editeval.inference.edited import ContinuationScore, EditedModel
from editeval.interfaces import EditEvent, RunState
from editeval.runner.callbacks import EditLog, Timing, Watchdog, weight_norm_ratio
from editeval.runner.progress import RichProgress, seconds_text
from editeval.runner.run_files import TIMINGS_FILE, read_collapse, read_edits, read_peak_memory, read_timings
from editeval.types import EditRequest, Score

REQUEST = EditRequest(request_id="a", prompt="{} is in", subject="Rome", target_new="France")


class FakeModel:
    """A model of one matrix whose canary costs `nats` a token, 1 when shown unedited."""

    def __init__(self, weight: torch.Tensor | None = None, *, nats: float = 1.0) -> None:
        self.now = torch.ones(2, 2) if weight is None else weight
        self.nats = nats
        self.edited_parameters = ("layer.weight",)

    def weight(self, parameter: str) -> torch.Tensor:
        return self.now

    def base_weight(self, parameter: str) -> torch.Tensor:
        return torch.ones(2, 2)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        nats, self.nats = self.nats, 1.0
        yield
        self.nats = nats

    def score(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[ContinuationScore]:
        one = ContinuationScore(log_prob=-2 * self.nats, token_log_probs=(-self.nats,) * 2, token_is_greedy=(True, True))
        return [one] * len(contexts)


def model(weight: torch.Tensor | None = None, *, nats: float = 1.0) -> EditedModel:
    return cast(EditedModel, FakeModel(weight, nats=nats))


def state(run_dir: Path, **fields: Any) -> RunState:
    return RunState(
        **{
            "run_dir": str(run_dir),
            "edit_key": "e" * 64,
            "model_name": "tiny",
            "method_name": "rome",
            "dataset_name": "facts",
            "rungs": (0, 1, 10),
            "num_edits": 0,
            "state_digest": "d0",
            "config": {},
            **fields,
        }
    )


def event(step: int, **fields: Any) -> EditEvent:
    return EditEvent(
        **{
            "step": step,
            "num_edits": step,
            "request_ids": (f"fact-{step}",),
            "seconds": 2.0,
            "digest": f"d{step}",
            "weights_digest": f"w{step}",
            "replayed": False,
            "diagnostics": {"target_log_prob_last": math.log(0.9), "loss_last": 0.125},
            **fields,
        }
    )


def clock(*ticks: float) -> Callable[[], float]:
    """A clock that shows these times one after the other, then the last for ever."""
    left = list(ticks)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def plain_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200, force_terminal=False), text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (math.inf, "?")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


# -- progress --------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_each_edit_is_one_plain_line_with_speed_probability_and_time_left(tmp_path: Path) -> None:
    console, text = plain_console()
    progress = RichProgress(console=console, clock=clock(0, 10, 20))
    progress.on_run_start(state(tmp_path))
    progress.on_edit_end(state(tmp_path), event(1), model())
    progress.on_edit_end(state(tmp_path), event(2), model())
    lines = text.getvalue().splitlines()
    assert lines[-1] == "edit 2/10  2.0 s  0.50 edits/s  target probability 0.9  loss 0.125  16 s of editing left"
    assert len(lines) == 4
    assert "\x1b" not in text.getvalue(), "a log holds no terminal codes"


def test_fast_edits_do_not_flood_a_log_but_a_rung_is_always_said(tmp_path: Path) -> None:
    console, text = plain_console()
    progress = RichProgress(console=console, clock=clock(0.0), seconds_between_lines=5)
    progress.on_run_start(state(tmp_path))
    for step in range(1, 11):
        progress.on_edit_end(state(tmp_path), event(step, replayed=True), model())
    edits = [line for line in text.getvalue().splitlines() if line.startswith("edit ")]
    assert [line.split("  ")[0] for line in edits] == ["edit 1/10", "edit 10/10"]


def test_track_yields_every_item_in_order_on_a_terminal_and_elsewhere() -> None:
    for terminal in (False, True):
        progress = RichProgress(console=Console(file=io.StringIO(), force_terminal=terminal))
        assert list(progress.track(iter(range(5)), description="covariance", total=5)) == [0, 1, 2, 3, 4]
        assert list(progress.track([], description="nothing")) == []


def test_long_silent_work_says_how_far_it_is() -> None:
    console, text = plain_console()
    progress = RichProgress(console=console, clock=clock(0, 5, 12, 13, 14))
    assert list(progress.track(["a", "b", "c", "d"], description="covariance")) == ["a", "b", "c", "d"]
    assert text.getvalue() == "covariance: 2/4 (12 s, 12 s left)\n"


def test_bars_are_gone_after_an_exception(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = RichProgress(console=console)
    progress.on_run_start(state(tmp_path))
    progress.on_edit_end(state(tmp_path), event(1), model())
    progress.on_exception(state(tmp_path), RuntimeError("broken"))
    assert console._live_stack == []


def test_square_brackets_in_a_message_are_shown_as_they_are() -> None:
    console, text = plain_console()
    RichProgress(console=console).message("[bold] request [/x]")
    assert text.getvalue() == "[bold] request [/x]\n"


# -- watchdog --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_watchdog_stops_at_weights_that_are_not_finite_and_names_them(tmp_path: Path, bad: float) -> None:
    broken = model(torch.tensor([[1.0, bad], [1.0, 1.0]]))
    assert Watchdog().on_edit_end(state(tmp_path), event(3), broken) == "edit 3 left non-finite weights in layer.weight"


def test_watchdog_without_limits_lets_a_model_degrade(tmp_path: Path) -> None:
    assert Watchdog().on_edit_end(state(tmp_path), event(3), model(torch.full((2, 2), 1e6), nats=50)) is None


def test_a_collapse_is_written_down_whether_or_not_the_run_goes_on(tmp_path: Path) -> None:
    heavy = model(torch.full((2, 2), 4.0))
    for on_collapse, stops in (("skip", True), ("continue", False)):
        folder = tmp_path / on_collapse
        watchdog = Watchdog(max_norm_ratio=3.0, on_collapse=cast(Any, on_collapse))
        assert (watchdog.on_edit_end(state(folder), event(4), heavy) is not None) is stops
        watchdog.on_edit_end(state(folder), event(7), heavy)
        noted = read_collapse(folder)
        assert noted is not None
        assert (noted["step"], noted["digest"], noted["request_ids"]) == (4, "d4", ["fact-4"]), "the first edit that broke it stays"
    with pytest.raises(ValueError, match="on_collapse='never'"):
        Watchdog(on_collapse=cast(Any, "never"))


def test_weights_that_are_not_finite_end_a_run_even_where_a_collapse_should_not(tmp_path: Path) -> None:
    broken = model(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    assert Watchdog(on_collapse="continue").on_edit_end(state(tmp_path), event(3), broken) is not None


def test_watchdog_stops_beyond_the_norm_limit_only(tmp_path: Path) -> None:
    watchdog = Watchdog(max_norm_ratio=3.0)
    assert watchdog.on_edit_end(state(tmp_path), event(3), model(torch.full((2, 2), 3.0))) is None
    reason = watchdog.on_edit_end(state(tmp_path), event(4), model(torch.full((2, 2), 3.1)))
    assert reason is not None
    assert "edit 4 brought a norm to 3.1 times" in reason


def test_watchdog_compares_the_canary_with_the_unedited_model(tmp_path: Path) -> None:
    watchdog = Watchdog(max_canary_ratio=math.e)
    watchdog.on_run_start(state(tmp_path))
    assert watchdog.on_edit_end(state(tmp_path), event(1), model(nats=1.9)) is None
    reason = watchdog.on_edit_end(state(tmp_path), event(2), model(nats=3.0))
    assert reason is not None
    assert "7.39 times" in reason  # e ** (3 - 1)


def test_watchdog_between_looks_is_silent_but_looks_at_every_rung(tmp_path: Path) -> None:
    broken, watchdog = model(torch.full((2, 2), math.nan)), Watchdog(every=100)
    assert watchdog.on_edit_end(state(tmp_path), event(3), broken) is None
    assert watchdog.on_edit_end(state(tmp_path), event(10), broken) is not None


def test_watchdog_refuses_limits_that_no_model_meets() -> None:
    with pytest.raises(ValueError, match=r"max_norm_ratio=0\.5 must be above 1"):
        Watchdog(max_norm_ratio=0.5)


def test_norm_ratio_is_nan_for_broken_weights_and_one_without_edits() -> None:
    untouched = FakeModel()
    untouched.edited_parameters = ()
    assert weight_norm_ratio(cast(EditedModel, untouched)) == 1.0
    assert math.isnan(weight_norm_ratio(model(torch.full((2, 2), math.nan))))


# -- timing ----------------------------------------------------------------------------------------------------------------


def test_timing_accounts_for_every_second_once(tmp_path: Path) -> None:
    console, text = plain_console()
    # made 0, run 3, edit 10-15 (2 s of it computing), replay 15-16, evaluation 16-36, end 40
    timing = Timing(console=console, clock=clock(0, 3, 10, 15, 15, 16, 16, 36, 40))
    timing.on_run_start(state(tmp_path))
    timing.on_edit_start(state(tmp_path), [REQUEST])
    timing.on_edit_end(state(tmp_path), event(1), model())
    timing.on_edit_start(state(tmp_path), [REQUEST])
    timing.on_edit_end(state(tmp_path), event(2, replayed=True), model())
    timing.on_evaluation_start(state(tmp_path), "quick")
    timing.on_evaluation_end(state(tmp_path), "quick", ())
    timing.on_run_end(state(tmp_path), ())
    assert dict(timing.rows()) == {
        "measuring quick": 20,
        Timing.OTHER: 11,  # from 3 to 10, and from 36 to 40
        Timing.BEFORE: 3,
        Timing.APPLY: 3,
        Timing.COMPUTE: 2,
        Timing.REPLAY: 1,
        "total": 40,
    }
    assert "measuring quick" in text.getvalue()
    assert sum(read_timings(tmp_path).values()) == 40
    peak = read_peak_memory(tmp_path)
    assert peak is not None
    assert peak > 50e6, "torch alone takes more; in bytes, not KiB"


def test_timings_add_up_over_launches_and_survive_a_failure(tmp_path: Path) -> None:
    for end in (10, 20):
        timing = Timing(clock=clock(0, 1, end))
        timing.on_run_start(state(tmp_path))
        timing.on_exception(state(tmp_path), RuntimeError("x"))
    assert read_timings(tmp_path) == {Timing.BEFORE: 2, Timing.OTHER: 28}
    rows = [json.loads(line) for line in (tmp_path / TIMINGS_FILE).read_text().splitlines()]
    assert [row["ended_by"] for row in rows] == ["RuntimeError", "RuntimeError"]


# -- edit log --------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_completes_the_edit_log_without_doubling_it(tmp_path: Path) -> None:
    first = EditLog()
    first.on_run_start(state(tmp_path))
    first.on_edit_end(state(tmp_path), event(1), model(torch.full((2, 2), 2.0)))
    second = EditLog()
    second.on_run_start(state(tmp_path))
    second.on_edit_end(state(tmp_path), event(1, replayed=True), model())
    second.on_edit_end(state(tmp_path), event(2, replayed=True, diagnostics={}), model())
    second.on_edit_end(state(tmp_path), event(3, diagnostics={"loss": math.inf}), model())
    rows = read_edits(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert len((tmp_path / "edits.jsonl").read_text().splitlines()) == 3
    assert rows[0]["diagnostics"] == {"target_log_prob_last": math.log(0.9), "loss_last": 0.125}
    assert rows[0]["weight_norm_ratio"] == 2.0
    assert rows[2]["diagnostics"] == {"loss": math.inf}


def test_progress_says_the_numbers_that_matter_of_an_evaluation_in_one_line(tmp_path: Path) -> None:
    def score(metric: str, protocol: str, value: float) -> Score:
        return Score(
            benchmark="edit-quality",
            task="facts",
            metric=metric,
            protocol=protocol,
            value=value,
            n=60,
            num_edits=5,
            state_digest="d",
            benchmark_key="k",
            seconds=4.0,
        )

    console, text = plain_console()
    progress = RichProgress(console=console, clock=clock(0, 4))
    progress.on_evaluation_start(state(tmp_path, num_edits=5), "edit-quality")
    progress.on_evaluation_end(
        state(tmp_path, num_edits=5),
        "edit-quality",
        [score("efficacy", "teacher_forced", 1.0), score("efficacy", "generation", 0.4567), score("locality", "generation", 0.5)],
    )
    assert text.getvalue() == "edit-quality, 5 edits (4.0 s): efficacy 0.457 (generation), locality 0.500 (generation)\n"
