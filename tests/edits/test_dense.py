"""What the numbers of a delta mean: each kind as a whole matrix, the same bits wherever it is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from editeval.edits.adam import BETAS, EPSILON
from editeval.edits.delta import DenseDelta, Edit, LowRankDelta, SelectedDelta, TunedDelta, WeightDelta
from editeval.edits.dense import Tuning, dense, joined, num_bytes, selected_delta, shape_of
from editeval.edits.encoding import Layout, encode

SHAPE = (48, 64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tuned(*, steps: int, positions: int = 3, seed: int = 0, max_change: float | None = None, same_inputs: bool = True) -> Tuning:
    tuning = Tuning(SHAPE, learning_rate=1e-2, max_change=max_change, device="cpu")
    for step in range(steps):
        right = random(positions, SHAPE[1], seed=seed if same_inputs else seed + step)
        tuning.step(random(positions, SHAPE[0], seed=1000 + seed + step), right)
    return tuning


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(
    steps=st.integers(1, 5), positions=st.integers(0, 4), seed=st.integers(0, 100), bound=st.sampled_from([None, 5e-3]), same=st.booleans()
)
def test_a_recorded_tuning_is_made_again_bit_for_bit(steps: int, positions: int, seed: int, bound: float | None, same: bool) -> None:
    tuning = tuned(steps=steps, positions=positions, seed=seed, max_change=bound, same_inputs=same)
    delta = tuning.delta("w")
    assert isinstance(delta, TunedDelta)
    encoded = encode(Edit(deltas=(delta,)))
    (back,) = Layout.parse(encoded.layout).decode(memoryview(b"".join(encoded.tensors))).deltas
    assert isinstance(back, TunedDelta)
    assert torch.equal(dense(back), tuning.change)
    assert bound is None or float(tuning.change.abs().max()) <= bound
    assert len(delta.right) == (positions if same else positions * steps)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    delta = tuned(steps=4).delta("w")
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(dense(delta))
    assert torch.equal(*found)


def test_adam_rounds_every_operation_as_ieee_754_says() -> None:
    """The same in numpy, whose operations are single ones: what makes a recorded tuning the same on every machine."""
    rate, one = 1e-2, numpy.float32
    tuning = Tuning(SHAPE, learning_rate=rate, max_change=None, device="cpu")
    first = second = change = numpy.zeros(SHAPE, numpy.float32)
    for step in range(1, 6):
        left, right = random(1, SHAPE[0], seed=step), random(1, SHAPE[1], seed=50 + step)
        tuning.step(left, right)
        gradient = left.numpy().T * right.numpy()
        first = first * one(BETAS[0]) + gradient * one(1 - BETAS[0])
        second = second * one(BETAS[1]) + gradient * gradient * one(1 - BETAS[1])
        scale = numpy.sqrt(second * one(1 / (1 - BETAS[1] ** step))) + one(EPSILON)
        change = change - first * one(rate / (1 - BETAS[0] ** step)) / scale
        assert (tuning.change.numpy() == change).all()


def test_the_smaller_form_is_kept() -> None:
    sizes = {}
    for steps in (1, 3, 40):
        tuning = tuned(steps=steps)
        delta = tuning.delta("w")
        sizes[steps] = num_bytes(delta)
        assert torch.equal(dense(delta), tuning.change)
        assert isinstance(delta, TunedDelta) == (steps < 40)
    assert sizes[1] < sizes[3] < sizes[40] == tuning.change.nbytes


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 3), seed=st.integers(0, 100))
def test_selected_elements_are_those_of_the_product_and_nothing_else(rows: int, columns: int, rank: int, seed: int) -> None:
    update = LowRankDelta(parameter="w", left=random(rows, rank, seed=seed), right=random(rank, columns, seed=seed + 1))
    chosen = random(rows, columns, seed=seed + 2) > 0
    selected = selected_delta(update, chosen)
    assert torch.equal(dense(selected), torch.where(chosen, dense(update), 0.0))
    assert shape_of(selected) == (rows, columns)


def test_the_sum_of_deltas_is_one_delta() -> None:
    parts = [LowRankDelta(parameter="w", left=random(5, 2, seed=seed), right=random(2, 7, seed=seed + 9)) for seed in (0, 1)]
    whole = joined(parts)
    assert isinstance(whole, LowRankDelta)
    torch.testing.assert_close(dense(whole), dense(parts[0]) + dense(parts[1]))
    mixed = joined([parts[0], DenseDelta(parameter="w", value=torch.ones(5, 7))])
    assert isinstance(mixed, DenseDelta)
    torch.testing.assert_close(dense(mixed), dense(parts[0]) + 1)
    assert joined(parts[:1]) is parts[0]


LOW_RANK = LowRankDelta(parameter="w", left=torch.ones(3, 2), right=torch.ones(2, 4))
SELECTED = selected_delta(LOW_RANK, torch.ones(3, 4, dtype=torch.bool))
TUNED = TunedDelta(
    parameter="w", left=torch.ones(2, 3), right=torch.ones(2, 4), steps=torch.tensor([[0, 0, 2]]), learning_rate=0.1, max_change=None
)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(LOW_RANK, right=torch.ones(3, 4)),
        replace(LOW_RANK, left=torch.ones(3)),
        replace(SELECTED, selected=torch.zeros(1, dtype=torch.uint8)),
        replace(TUNED, steps=torch.tensor([[1, 0, 2]])),
        replace(TUNED, steps=torch.tensor([[0, 1, 2]])),
        replace(TUNED, steps=torch.tensor([[-1, 0, 1]])),
        replace(TUNED, steps=torch.tensor([0, 0, 2])),
        DenseDelta(parameter="w", value=torch.ones(3)),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_have_no_shape(wrong: WeightDelta) -> None:
    assert shape_of(wrong) is None


def test_tensors_that_fit_have_the_weight_s_shape() -> None:
    right: list[WeightDelta] = [LOW_RANK, SELECTED, TUNED, DenseDelta(parameter="w", value=torch.ones(3, 4))]
    assert isinstance(SELECTED, SelectedDelta)
    for delta in right:
        assert shape_of(delta) == (3, 4) == tuple(dense(delta).shape)
