"""Hooks show what a forward pass computes, change it where asked, and never stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from editeval.models.sites import SITES
from editeval.models.tiny import TinyModel
from editeval.models.trace import capture, replace_output, run_until


class Chain(nn.Module):
    """Three maps in a row, the second with a tuple output; counts how often each ran."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = Counted(generator), Tupled(generator), Counted(generator)

    def forward(self, x: Tensor) -> Tensor:
        hidden_states, _rest = self.second(hidden_states=self.first(x))
        result: Tensor = self.third(hidden_states)
        return result


class Counted(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.calls = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        return hidden_states @ self.weight.T


class Tupled(Counted):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:  # type: ignore[override]
        return super().forward(hidden_states), "rest"


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture
def chain() -> Chain:
    return Chain()


X = torch.arange(8.0).reshape(2, 4)


def test_capture_records_inputs_and_outputs_by_path(chain: Chain) -> None:
    with capture(chain, ["first", "second"], inputs=True, outputs=True) as trace:
        result = chain(X)
    assert torch.equal(trace.inputs["first"], X)
    assert torch.equal(trace.inputs["second"], trace.outputs["first"])
    assert torch.equal(trace.outputs["second"] @ chain.third.weight.T, result)
    assert not trace.outputs["first"].requires_grad


def test_stop_at_an_output_skips_everything_after_it(chain: Chain) -> None:
    with capture(chain, ["second", "first"], outputs=True, stop=True) as trace:
        run_until(chain, x=X)
        run_until(chain, x=X)
    assert set(trace.outputs) == {"first", "second"}
    assert (chain.first.calls, chain.second.calls, chain.third.calls) == (2, 2, 0)


def test_stop_at_an_input_skips_the_module_itself(chain: Chain) -> None:
    with capture(chain, ["second"], inputs=True, stop=True) as trace:
        run_until(chain, x=X)
    assert torch.equal(trace.inputs["second"], X @ chain.first.weight.T)
    assert chain.second.calls == 0


def test_a_pass_that_failed_midway_does_not_cut_the_next_one_short(chain: Chain) -> None:
    with capture(chain, ["first", "third"], outputs=True, stop=True) as trace:
        with pytest.raises(ValueError, match="midway"), replace_output(chain, "second", fail):
            run_until(chain, x=X)
        trace.outputs.clear()
        run_until(chain, x=X)
    assert set(trace.outputs) == {"first", "third"}


def test_a_stopped_pass_outside_run_until_says_what_to_call(chain: Chain) -> None:
    with pytest.raises(Exception, match="run_until"), capture(chain, ["first"], outputs=True, stop=True):
        chain(X)


def test_run_until_lets_other_errors_through(chain: Chain) -> None:
    with (
        pytest.raises(RuntimeError, match="mat1 and mat2"),
        capture(chain, ["third"], outputs=True, stop=True),
    ):
        run_until(chain, x=torch.zeros(2, 5))


def test_replace_output_changes_the_result_and_keeps_the_rest_of_a_tuple(chain: Chain) -> None:
    delta = torch.tensor([1.0, 0.0, 0.0, 0.0])
    plain = chain(X)
    with replace_output(chain, "second", lambda output: output + delta):
        assert chain.second(X)[1] == "rest"
        edited = chain(X)
    torch.testing.assert_close(edited - plain, (delta @ chain.third.weight.T).expand(2, 4))
    assert torch.equal(chain(X), plain)


def test_gradients_reach_what_replace_output_adds(chain: Chain) -> None:
    delta = torch.zeros(4, requires_grad=True)
    with replace_output(chain.requires_grad_(False), "first", lambda output: output + delta):
        chain(X).sum().backward()  # type: ignore[no-untyped-call]
    assert delta.grad is not None
    assert delta.grad.abs().sum() > 0


def test_hooks_are_gone_after_success_and_after_an_exception(chain: Chain) -> None:
    with capture(chain, ["first"], inputs=True, outputs=True, stop=True), replace_output(chain, "third", torch.neg):
        assert hooks(chain) == 3
        run_until(chain, x=X)
    assert hooks(chain) == 0
    with pytest.raises(ValueError, match="midway"), capture(chain, ["first"], outputs=True), replace_output(chain, "second", fail):
        chain(X)
    assert hooks(chain) == 0


def test_a_misspelt_path_leaves_no_hook_behind(chain: Chain) -> None:
    with pytest.raises(AttributeError, match="fourth"), capture(chain, ["first", "fourth"], outputs=True):
        pass
    assert hooks(chain) == 0


def test_nothing_to_capture_is_an_error(chain: Chain) -> None:
    with pytest.raises(ValueError, match="nothing to capture"), capture(chain, ["first"]):
        pass


def test_clone_survives_what_is_written_in_place_later(chain: Chain) -> None:
    x = X.clone()
    with capture(chain, ["first"], inputs=True, clone=True) as trace:
        chain(x)
    x.zero_()
    assert torch.equal(trace.inputs["first"], X)


@pytest.mark.parametrize("architecture", SITES)
def test_keys_captured_with_stop_equal_those_of_the_whole_pass(architecture: str, cache_dir: object) -> None:
    lm = TinyModel(name="tiny", architecture=architecture, cache_dir=str(cache_dir)).load()
    tokens = lm.tokenizer("The capital of France is", return_tensors="pt").input_ids.to(lm.module.device)
    path, attention, last = lm.sites.mlp_out.format(1), lm.sites.attention.format(1), lm.sites.layers.format(3)
    with torch.no_grad(), capture(lm.module, [path, attention, last], inputs=True, outputs=True) as whole:
        lm.module(input_ids=tokens)
    with torch.no_grad(), capture(lm.module, [path], inputs=True, stop=True) as cut:
        run_until(lm.module, input_ids=tokens)
    assert torch.equal(cut.inputs[path], whole.inputs[path])
    assert whole.inputs[path].shape == (1, tokens.shape[1], lm.description.intermediate_size)
    assert whole.outputs[last].shape == whole.inputs[attention].shape == (1, tokens.shape[1], lm.description.hidden_size)


def fail(output: Tensor) -> Tensor:
    raise ValueError("midway")
