"""What `python -m editeval` makes of its words, before any command runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from editeval.__main__ import _composed, _options, main
from editeval.runner.run_files import write_manifest
from editeval.types import EditevalError


@pytest.fixture(autouse=True)
def _no_hydra() -> None:
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("logger=null", "logger=null is not possible; for none write logger=[]"),
        ("callback=null", "callback=null is not possible; for none write callback=silent"),
        ("debug=null", "debug=null is not possible; for none leave it out"),
        ("method=null", "method=null is not possible, a run needs one; known: alphaedit, "),
        ("hydra/launcher=null", "hydra/launcher=null is not possible, a run needs one; known: local, "),
        ("method=3", "method has no option 3; known: alphaedit, "),
        ("num_edits={a:1}", "Error merging override num_edits={a:1}: "),
        ("seed", "'seed' is no setting; write KEY=VALUE"),
        ("paths.runs=/tmp/für", "paths.runs=/tmp/für cannot be read; "),
        ("paths.runs=/tmp/für", """'paths.runs="/tmp/für"'"""),
        ("paths.runs=a(b c", """'paths.runs="a(b c"'"""),
    ],
)
def test_what_does_not_compose_is_one_sentence(override: str, expected: str) -> None:
    with pytest.raises(EditevalError) as caught:
        _composed(["seed=1", override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Exception" not in str(caught.value)


@pytest.mark.parametrize("value", ["/tmp/für", "a(b c"])
def test_the_advice_for_a_path_that_cannot_be_read_works(value: str) -> None:
    assert _composed([f'paths.runs="{value}"']).paths.runs == value


def test_overrides_may_stand_behind_an_option() -> None:
    assert _options(["doctor", "model=a", "--offline", "dataset=b"]).overrides == ["model=a", "dataset=b"]
    assert _options(["prefetch", "model=a", "--to", "x", "dataset=b"]).overrides == ["model=a", "dataset=b"]
    retried = _options(["retry", "folder", "--sweep", "s", "hydra.launcher.timeout_min=600"])
    assert (retried.runs, retried.overrides) == (Path("folder"), ["hydra.launcher.timeout_min=600"])


@pytest.mark.parametrize("words", [["doctor", "a=1", "--offline", "model"], ["doctor", "--offlin_e=1"], ["verify", "run", "seed=1"]])
def test_other_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_an_override_in_the_place_of_the_folder_is_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def retry(runs: Path, *, sweep: str | None, more: list[str], use_queue: bool) -> int:
        asked.extend([runs, sweep, more])
        return 0

    monkeypatch.setattr("editeval.sweep.show.retry", retry)
    assert main(["retry", "hydra.launcher.timeout_min=600"]) == 0
    assert asked == [Path("runs"), None, ["hydra.launcher.timeout_min=600"]]


@pytest.mark.parametrize("command", ["export RUN --to FILE", "prefetch benchmark=[edit-quality] model=tiny-gpt2 --to FILE"])
def test_an_output_that_is_a_file_is_named_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("editeval.revisit.load_edited", lambda *_, **__: pytest.fail("the model was loaded"))
    file, run = tmp_path / "file", tmp_path / "run"
    file.write_text("")
    write_manifest(run, {"edit_key": "ab"})
    assert main([{"RUN": str(run), "FILE": str(file)}.get(word, word) for word in command.split()]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert str(file) in said
    assert "File exists" in said
    assert said.endswith("a folder that can be written")


def test_a_report_that_cannot_be_written_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("editeval.report.build.run_report", lambda *_, to, **__: to.mkdir())
    write_manifest(tmp_path / "run", {"edit_key": "ab"})
    file = tmp_path / "file"
    file.write_text("")
    assert main(["report", str(tmp_path / "run"), "--to", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}: File exists; choose a folder that can be written\n"
