from __future__ import annotations

import hashlib
import time
from contextlib import suppress

import pytest
import torch

from editeval.edits.delta import DenseDelta, Edit, LowRankDelta
from editeval.inference.edited import EditedModel
from editeval.models.model import LanguageModel
from editeval.models.sites import SITES
from editeval.types import EditError, EditevalError
from tests.inference.conftest import Load, cast_parameters

EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()


def mlp_out(lm: LanguageModel, layer: int = 1) -> str:
    return lm.sites.mlp_out.format(layer) + ".weight"


def low_rank(model: EditedModel, *, seed: int = 0, rank: int = 1, scale: float = 0.1) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    name = mlp_out(model.lm)
    d_out, d_in = model.weight(name).shape
    left, right = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    return Edit(deltas=(LowRankDelta(parameter=name, left=scale * left, right=right),), auxiliary={"keys": right})


def state_of(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}


def same_state(lm: LanguageModel, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in lm.module.state_dict().items())


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def model(request: pytest.FixtureRequest, load_tiny: Load) -> EditedModel:
    lm = load_tiny("gpt2")
    cast_parameters(lm, request.param)
    return EditedModel(lm)


@pytest.mark.parametrize("architecture", SITES)
def test_delta_is_added_as_output_by_input_in_every_architecture(load_tiny: Load, architecture: str) -> None:
    model = EditedModel(load_tiny(architecture))
    name = mlp_out(model.lm)
    keys = torch.randn(5, model.weight(name).shape[1], generator=torch.Generator().manual_seed(1))
    linear = model.lm.module.get_submodule(name.removesuffix(".weight"))
    with torch.no_grad():
        before = linear(keys)
        edit = low_rank(model)
        model.apply(edit)
        (delta,) = edit.deltas
        assert isinstance(delta, LowRankDelta)
        torch.testing.assert_close(linear(keys) - before, keys @ (delta.left @ delta.right).T, atol=1e-5, rtol=1e-4)


def test_low_rank_and_dense_deltas_of_one_product_agree(load_tiny: Load) -> None:
    low, dense = EditedModel(load_tiny("gpt2")), EditedModel(load_tiny("gpt2"))
    edit = low_rank(low, rank=3)
    (delta,) = edit.deltas
    assert isinstance(delta, LowRankDelta)
    low.apply(edit)
    dense.apply(Edit(deltas=(DenseDelta(parameter=delta.parameter, value=delta.left @ delta.right),)))
    torch.testing.assert_close(low.weight(delta.parameter), dense.weight(delta.parameter), atol=1e-6, rtol=1e-6)


def test_restore_is_bit_exact_and_forgets_every_edit(model: EditedModel) -> None:
    before = state_of(model.lm)
    base = model.base_weight(mlp_out(model.lm)).clone()
    for seed in range(3):
        model.apply(low_rank(model, seed=seed))
    assert not same_state(model.lm, before)
    assert torch.equal(model.base_weight(mlp_out(model.lm)), base)
    model.restore()
    assert same_state(model.lm, before)
    assert (model.num_applied, model.auxiliary, model.weights_digest()) == (0, [], EMPTY_DIGEST)


def test_unedited_is_exact_both_ways_even_when_left_by_an_error(model: EditedModel) -> None:
    base = state_of(model.lm)
    base_score = model.score(["The town"], [" of Rome"])
    model.apply(low_rank(model))
    edited, digest, edited_score = state_of(model.lm), model.weights_digest(), model.score(["The town"], [" of Rome"])

    def look_and_fail() -> None:
        with model.unedited(), model.unedited():
            assert same_state(model.lm, base)
            assert model.weights_digest() == EMPTY_DIGEST
            assert model.score(["The town"], [" of Rome"]) == base_score
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    assert same_state(model.lm, edited)
    assert model.weights_digest() == digest
    assert model.score(["The town"], [" of Rome"]) == edited_score != base_score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_other_weights_are_held_within_a_context_and_the_way_back_is_exact(load_tiny: Load, architecture: str, dtype: torch.dtype) -> None:
    lm = load_tiny(architecture)
    cast_parameters(lm, dtype)
    model = EditedModel(lm)
    model.apply(low_rank(model, scale=1e-4))
    state, digest, name = state_of(lm), model.weights_digest(), mlp_out(lm)
    before = model.weight(name).clone()
    other = before + 1e-4 * torch.randn(before.shape, generator=torch.Generator().manual_seed(2))  # below half precision's steps
    module = lm.module.get_submodule(name.removesuffix(".weight"))
    with suppress(KeyError), model.holding({name: other}):
        assert torch.equal(model.weight(name), other)  # also where the parameter itself is rounded
        shown = module.get_parameter("weight").data
        assert torch.equal(shown, (other.T if lm.sites.transposed else other).to(dtype))
        raise KeyError
    assert torch.equal(model.weight(name), before)
    assert model.weights_digest() == digest
    assert same_state(lm, state)


def test_unedited_model_refuses_edits_and_restore(model: EditedModel) -> None:
    model.apply(low_rank(model))
    with model.unedited():
        with pytest.raises(EditevalError, match="leave the unedited"):
            model.apply(low_rank(model))
        with pytest.raises(EditevalError, match="leave the unedited"):
            model.restore()
    assert model.num_applied == 1


def test_replay_equals_the_live_run_bit_for_bit(model: EditedModel, load_tiny: Load) -> None:
    edits, digests = [], []
    for seed in range(6):
        edits.append(low_rank(model, seed=seed, rank=1 + seed % 3))
        with torch.inference_mode(mode=seed % 2 == 0):  # who applies, and how, must not matter
            model.apply(edits[-1])
        model.score(["The town"], [" of Rome"])
        digests.append(model.weights_digest())
    live = state_of(model.lm)
    model.restore()
    replayed = []
    for edit in edits:
        model.apply(edit)
        replayed.append(model.weights_digest())
    assert replayed == digests
    assert len(set(digests)) == len(digests)
    assert same_state(model.lm, live)


def test_updates_below_half_precision_add_up(load_tiny: Load) -> None:
    lm = load_tiny("llama")
    cast_parameters(lm, torch.bfloat16)
    model = EditedModel(lm)
    name = mlp_out(lm)
    shape = model.weight(name).shape
    before = lm.module.get_parameter(name).clone()
    step = Edit(deltas=(DenseDelta(parameter=name, value=torch.full(shape, 1e-5)),))
    digests = set()
    for _ in range(400):
        model.apply(step)
        digests.add(model.weights_digest())
    assert len(digests) == 400
    torch.testing.assert_close(model.weight(name), before.float() + 4e-3, atol=1e-6, rtol=1e-4)
    assert torch.equal(lm.module.get_parameter(name), model.weight(name).to(torch.bfloat16))


def test_edit_of_several_matrices_happens_whole_or_not_at_all(model: EditedModel) -> None:
    before = state_of(model.lm)
    good = low_rank(model).deltas[0]
    shape = model.weight(mlp_out(model.lm, 0)).shape
    name = mlp_out(model.lm, 0)
    unknown = "transformer.h.7.mlp.c_proj.weight"
    for bad, reason in (
        (DenseDelta(parameter=name, value=torch.full(shape, torch.nan)), "not finite"),
        (DenseDelta(parameter=name, value=torch.zeros(shape[1], shape[0])), r"is \(128, 32\); the weight is \(32, 128\)"),
        (DenseDelta(parameter=unknown, value=torch.zeros(shape)), "no parameter.*similar: transformer.h.*mlp.c_proj.weight"),
        (LowRankDelta(parameter=name, left=torch.ones(shape[0], 2), right=torch.ones(1, shape[1])), r"\(32, 2\), \(1, 128\) are not"),
    ):
        with pytest.raises(EditError, match=reason):
            model.apply(Edit(deltas=(good, bad)))
        assert same_state(model.lm, before)
        assert model.weights_digest() == EMPTY_DIGEST
        assert model.num_applied == 0


def test_sum_that_overflows_the_parameter_is_an_error(load_tiny: Load) -> None:
    lm = load_tiny("gpt2")
    cast_parameters(lm, torch.float16)
    model = EditedModel(lm)
    before = state_of(lm)
    with pytest.raises(EditError, match="not finite"):
        model.apply(low_rank(model, scale=1e6))
    assert same_state(lm, before)


def test_edit_that_changes_nothing_is_an_error(model: EditedModel) -> None:
    for scale in (0.0, 1e-30):
        with pytest.raises(EditError, match="changes nothing"):
            model.apply(low_rank(model, scale=scale))
    assert model.num_applied == 0


def test_edit_without_deltas_counts_and_leaves_the_model(model: EditedModel) -> None:
    before = state_of(model.lm)
    model.apply(Edit(deltas=()))
    model.apply(Edit(deltas=(), auxiliary={"keys": torch.ones(2)}))
    assert model.num_applied == 2
    assert [list(auxiliary) for auxiliary in model.auxiliary] == [[], ["keys"]]
    assert same_state(model.lm, before)
    assert model.weights_digest() == EMPTY_DIGEST


def test_two_deltas_of_one_matrix_in_one_edit_equal_two_edits(load_tiny: Load) -> None:
    together, apart = EditedModel(load_tiny("gpt2")), EditedModel(load_tiny("gpt2"))
    first, second = low_rank(together, seed=1), low_rank(together, seed=2)
    together.apply(Edit(deltas=(*first.deltas, *second.deltas)))
    apart.apply(first)
    apart.apply(second)
    assert together.weights_digest() == apart.weights_digest()


def test_tied_matrix_has_one_state_under_both_names(load_tiny: Load) -> None:
    model = EditedModel(load_tiny("qwen3"))
    shape = model.weight("lm_head.weight").shape
    model.apply(Edit(deltas=(DenseDelta(parameter="lm_head.weight", value=torch.ones(shape)),)))
    assert torch.equal(model.weight("model.embed_tokens.weight"), model.base_weight("model.embed_tokens.weight") + 1)
    model.restore()
    assert torch.equal(model.weight("lm_head.weight"), model.base_weight("model.embed_tokens.weight"))


def test_replay_applies_over_a_thousand_rank_one_edits_a_second(load_tiny: Load) -> None:
    model = EditedModel(load_tiny("gpt2"))
    edits = [low_rank(model, seed=seed, scale=1e-3) for seed in range(200)]
    started = time.process_time()
    for edit in edits:
        model.apply(edit)
    assert len(edits) / (time.process_time() - started) > 1000
