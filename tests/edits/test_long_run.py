"""A long run: its journal is hardly larger than its numbers, and replaying it gives the state that the run left, bit for bit.

How fast it opens and replays is measured by `benchmarks/journal_growth.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from editeval.edits.delta import Edit, LowRankDelta
from editeval.edits.journal import EditJournal
from editeval.inference.edited import EditedModel
from editeval.models.tiny import TinyModel
from tests.edits.writers import GENESIS

WIDTH = 64  # of the tiny model; its keys are four times as wide


def noise(parameter: str, shape: tuple[int, ...], count: int) -> Iterator[Edit]:
    """Yield rank-one edits, each far below half a unit in the last place of a bfloat16 weight."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        left, right = (torch.randn(size, generator=generator) for size in shape)
        yield Edit(deltas=(LowRankDelta(parameter=parameter, left=3e-4 * left[:, None], right=1e-2 * right[None]),))


@pytest.mark.parametrize(("dtype", "edits"), [(torch.float32, 10_000), (torch.bfloat16, 1_000)])
def test_a_long_run_replays_to_its_live_state_from_a_journal_as_large_as_its_numbers(
    dtype: torch.dtype, edits: int, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # ten thousand of them take a minute, and say nothing of what is written
    source = TinyModel(name="tiny", architecture="gpt2", cache_dir=cache_dir, device="cpu", num_layers=1, hidden_size=WIDTH)
    models = []
    for _ in range(2):
        lm = source.load()
        lm.module.to(dtype)
        models.append(EditedModel(lm))
    live, replayed = models
    parameter = live.lm.sites.mlp_out.format(0) + ".weight"
    shape = tuple(live.weight(parameter).shape)
    before = live.weight(parameter).clone()
    with EditJournal.open(tmp_path / "journal", genesis=GENESIS) as journal:
        for number, edit in enumerate(noise(parameter, shape, edits)):
            live.apply(journal.append((str(number),), edit, 0.0).edit)
    size = sum(path.stat().st_size for path in (tmp_path / "journal").rglob("*") if path.is_file())
    assert size <= 1.1 * edits * sum(shape) * 4
    assert len(list((tmp_path / "journal").rglob("*"))) < 10
    with EditJournal.open(tmp_path / "journal", genesis=GENESIS) as journal:
        assert len(journal) == edits
        for entry in journal.entries(0, edits):
            replayed.apply(entry.edit)
    assert torch.equal(replayed.weight(parameter), live.weight(parameter))
    assert replayed.weights_digest() == live.weights_digest()
    stored = dict(live.lm.module.named_parameters())[parameter].detach().float().T  # GPT-2 stores (d_in, d_out)
    assert float((stored - before).norm() / before.norm()) > 1e-3  # what no single edit could change in half precision has added up
