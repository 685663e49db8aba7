"""What implementations of locate-then-edit are known to get wrong: each pitfall with the test that keeps us from it.

Those that no other file covers are tested here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from editeval.build import build
from editeval.edits.delta import LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.keyvalue.lookup import locate
from editeval.keyvalue.solve import factorise
from editeval.keyvalue.target_value import fact_rows, optimise
from editeval.methods.rome import ROME
from editeval.models.tiny import TinyModel
from editeval.models.trace import capture
from editeval.types import EditevalError, EditRequest, SilentProgress

CONTEXTS = ["{}", "Yesterday. {}", "Because of the long rain. {}"]
REQUEST = EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")

SPREAD = "methods/test_spread_methods.py"
CONTRACT = "contracts/test_method_contract.py"
PITFALLS = {
    "keys of two contexts in one quotient": "methods/test_rome.py::test_a_bare_key_unlike_the_mean_key_blows_up_only_the_published_update",
    "C = I counted as ROME": "methods/test_rome.py::test_the_covariance_changes_the_direction_and_leaving_it_out_means_identity",
    "second moments of an edited model": f"{SPREAD}::test_second_moments_are_of_the_unedited_model_whenever_they_are_made",
    "statistics under another model's name": "keyvalue/test_covariance.py::test_another_model_site_text_or_length_is_another_entry",
    "a sum in place of a mean": "keyvalue/test_covariance.py::test_covariances_of_several_layers_equal_the_plain_sum",
    "keys and statistics in half precision": f"{SPREAD}::test_a_half_precision_model_gets_nearly_the_same_float32_update",
    "an inverse whose residual nobody looks at": "methods/test_pitfalls.py::test_an_inverse_of_a_badly_conditioned_matrix_is_refused",
    "a dense solve that a factor replaces": "keyvalue/test_solve.py::test_regularised_keys_equal_a_dense_solve",
    "layout told by shape": "methods/test_pitfalls.py::test_a_square_matrix_is_edited_the_right_way_round",
    "the subject's end found by encoding a part": "keyvalue/test_lookup.py::test_the_position_found_is_that_of_the_subjects_last_token",
    "every occurrence of the subject replaced": "datasets/test_rows.py::test_the_last_whole_mention_of_the_subject_becomes_the_placeholder",
    "a second blank before the target": "keyvalue/test_lookup.py::test_a_target_is_joined_with_exactly_one_blank",
    "BOS inside a prompt": "keyvalue/test_lookup.py::test_a_beginning_token_stands_once_before_the_prompt",
    "merges over the subject's end": "keyvalue/test_lookup.py::test_a_target_that_changes_the_subjects_tokens_is_refused",
    "padding side felt by edits": "methods/test_pitfalls.py::test_the_tokenizers_padding_side_and_token_do_not_change_an_edit",
    "a token of the prompt taken for padding": "methods/test_pitfalls.py::test_the_tokenizers_padding_side_and_token_do_not_change_an_edit",
    "padding side felt by scores": f"{CONTRACT}::test_10_padding_batch_size_and_neighbours_do_not_change_a_score",
    "1/n for 1/sqrt(n)": f"{SPREAD}::test_pmet_writes_attention_only_when_asked_and_spreads_by_square_roots",
    "keys not computed again after the layer below": "keyvalue/test_spread.py::test_keys_of_a_higher_layer_feel_the_updates_below_it",
    "context prefixes of another model or run": "keyvalue/test_prefixes.py::test_the_seed_alone_decides_and_no_global_random_state_moves",
    "prefixes written by an edited model": "methods/test_rome.py::test_statistics_and_prefixes_are_of_the_unedited_model_even_after_edits",
    "state of another run in the same process": f"{CONTRACT}::test_06_another_trajectory_in_the_same_process_changes_nothing",
    "AlphaEdit's keys lost on resume": f"{SPREAD}::test_a_run_in_batches_resumed_from_the_journal_equals_the_unbroken_one",
    "AlphaEdit's keys kept after a reset": f"{SPREAD}::test_alphaedit_forgets_what_was_restored",
    "a null space without directions": "methods/test_spread_golden.py::test_a_threshold_that_leaves_no_direction_is_refused",
    "a resume that skips its edits": f"{CONTRACT}::test_04_some_edits_then_more_after_a_resume_equal_all_at_once",
    "updates lost in bfloat16": "edits/test_long_run.py::test_a_long_run_replays_to_its_live_state_from_a_journal_as_large_as_its_numbers",
    "a control of another size": f"{SPREAD}::test_random_edit_has_the_norm_and_rank_of_the_method_that_it_follows",
    "an edit that changes nothing": "inference/test_weights.py::test_edit_that_changes_nothing_is_an_error",
    "a device by its number": "methods/test_two_devices.py::test_no_device_is_named_by_its_number",
}


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_every_known_pitfall_has_its_test(pitfall: str) -> None:
    file, _, name = PITFALLS[pitfall].partition("::")
    module = import_module("tests." + file.removesuffix(".py").replace("/", "."))
    assert callable(getattr(module, name))


def test_an_inverse_of_a_badly_conditioned_matrix_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    matrix = turn @ torch.diag(torch.logspace(0, -13, 64, dtype=torch.float64)) @ turn.T
    factor = factorise((matrix + matrix.T) / 2)
    with pytest.raises(EditevalError, match="residual"):
        factor.inverse()


@pytest.fixture
def rome(compose_config: Callable[..., DictConfig]) -> ROME:
    config = compose_config("method=rome", "model=tiny-gpt2", "corpus.tokens=2000", "method.num_steps=5", "method.layer=1")
    method = build(config.method, "method", EditMethod)
    assert isinstance(method, ROME)
    return replace(method, context_prefixes=CONTEXTS)


def test_a_square_matrix_is_edited_the_right_way_round(rome: ROME, cache_dir: Path, tmp_path: Path) -> None:
    """GPT-2 stores (d_in, d_out); where both are equal no shape tells that an update was written transposed."""
    lm = TinyModel(name="tiny", architecture="gpt2", cache_dir=cache_dir, device="cpu", overrides={"n_inner": 64}).load()
    model = EditedModel(lm)
    editor = replace(rome, key="prompt").prepare(model, Cache(tmp_path), SilentProgress())
    assert model.weight(f"{editor.site}.weight").shape == (64, 64)
    rows = fact_rows(lm.tokenizer, REQUEST, CONTEXTS)
    value = optimise(lm, [rows], layer=1, sites=[editor.site], settings=editor.target_settings)[0]
    model.apply(editor.edit([REQUEST], seed=0))
    located = locate(lm.tokenizer, REQUEST.prompt, REQUEST.subject)
    with torch.no_grad(), capture(lm.module, [editor.site], outputs=True) as trace:
        lm.module(input_ids=torch.tensor([located.token_ids]))
    wanted = value.initial[editor.site] + value.deltas[editor.site]
    assert torch.allclose(trace.outputs[editor.site][0, located.subject_last], wanted, atol=1e-3 * float(wanted.norm()))


@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_tokenizers_padding_side_and_token_do_not_change_an_edit(
    compose_config: Callable[..., DictConfig], cache_dir: Path, tmp_path: Path, architecture: str, method: str
) -> None:
    config = compose_config(f"method={method}", "model=tiny-gpt2", "corpus.tokens=2000", "method.num_steps=5")
    config.method.context_prefixes = list(CONTEXTS)
    made = build(config.method, "method", EditMethod)
    edits = []
    for side in ("left", "right"):
        lm = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir, device="cpu").load()
        lm.tokenizer.padding_side = side
        if side == "left":
            subject = locate(lm.tokenizer, REQUEST.prompt, REQUEST.subject)
            lm.tokenizer.pad_token_id = subject.token_ids[subject.subject_last]  # the very token that is edited at
        edits.append(made.prepare(EditedModel(lm), Cache(tmp_path), SilentProgress()).edit([REQUEST], seed=0))
    for left, right in zip(edits[0].deltas, edits[1].deltas, strict=True):
        assert isinstance(left, LowRankDelta)
        assert isinstance(right, LowRankDelta)
        assert torch.equal(left.left, right.left)
        assert torch.equal(left.right, right.right)
