"""Steps that are captured: everything that a step reads is handed over, and a graph takes the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editeval.keyvalue.descent import Descent
from editeval.keyvalue.graphs import MOST_GRAPHS, StepGraph, StepGraphs, addresses, can_capture
from editeval.keyvalue.objective import FactRows, Objective, TargetSettings
from editeval.keyvalue.target_value import SHAPE_MULTIPLE, fact_rows, optimise
from editeval.models.model import LanguageModel
from editeval.models.sites import SITES
from editeval.models.tiny import TinyModel
from editeval.types import EditRequest

LAYER = 1
SETTINGS = TargetSettings(num_steps=6, learning_rate=0.3, weight_decay=0.5, clamp_norm_factor=4.0, kl_factor=0.0625, early_stop_loss=0.05)
CONTEXTS = ("{}", "Yesterday it rained in the north. {}")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def request(subject: str, target: str) -> EditRequest:
    return EditRequest(request_id=subject, prompt="The mother tongue of {} is", subject=subject, target_new=target)


FIRST = request("Danielle", "English")
OTHERS = [request(subject, f"Engl{letter}sh") for subject in ("Berthold", "Danielle") for letter in "aeouklmnt"]


def load(architecture: str, cache_dir: Path, device: str = "cpu") -> LanguageModel:
    return TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir, device=device).load()


def rows_of(lm: LanguageModel, fact: EditRequest) -> FactRows:
    return fact_rows(lm.tokenizer, fact, CONTEXTS)


def descent_of(lm: LanguageModel, fact: EditRequest, *, multiple: int = SHAPE_MULTIPLE) -> Descent:
    sites = [lm.sites.mlp_out.format(LAYER)]
    descent = Descent(Objective(lm, [rows_of(lm, fact)], layer=LAYER, sites=sites, settings=SETTINGS, multiple=multiple), SETTINGS)
    descent.evaluate()
    return descent


def shapes_of(descent: Descent) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in descent.tensors())


def another_of_its_shape(lm: LanguageModel) -> EditRequest:
    wanted = shapes_of(descent_of(lm, FIRST))
    return next(fact for fact in OTHERS if shapes_of(descent_of(lm, fact)) == wanted)


def steps(descent: Descent) -> torch.Tensor:
    for _ in range(1, SETTINGS.num_steps):
        descent.run()
    (delta,) = descent.deltas.values()
    return delta.detach().clone()


@pytest.mark.parametrize("architecture", SITES)
def test_a_step_reads_nothing_beside_its_tensors_and_the_model(cache_dir: Path, architecture: str) -> None:
    lm = load(architecture, cache_dir)
    fact = another_of_its_shape(lm)
    expected = steps(descent_of(lm, fact))
    first, second = descent_of(lm, FIRST), descent_of(lm, fact)
    steps(first)  # whatever it left behind is overwritten
    with torch.no_grad():
        for ours, theirs in zip(first.tensors(), second.tensors(), strict=True):
            ours.copy_(theirs)
    assert torch.equal(steps(first), expected)


@pytest.mark.parametrize("architecture", SITES)
def test_rounding_the_positions_up_changes_nothing(cache_dir: Path, architecture: str) -> None:
    lm = load(architecture, cache_dir)
    rounded, exact = steps(descent_of(lm, FIRST)), steps(descent_of(lm, FIRST, multiple=1))
    assert float(exact.norm()) > 0.1
    assert float((rounded - exact).norm() / exact.norm()) < 1e-5


def test_shapes_come_up_again(cache_dir: Path) -> None:
    lm = load("llama", cache_dir)
    facts = [request("Danielle Darrieux"[:length], "English") for length in range(4, 17, 2)]
    shapes = {shapes_of(descent_of(lm, fact)) for fact in facts}
    exact = {shapes_of(descent_of(lm, fact, multiple=1)) for fact in facts}
    assert len(shapes) < len(exact)


def test_a_model_on_the_cpu_is_not_captured(cache_dir: Path) -> None:
    assert not can_capture(load("gpt2", cache_dir).module)


def test_addresses_tell_that_a_weight_was_put_elsewhere(cache_dir: Path) -> None:
    module = load("gpt2", cache_dir).module
    before = addresses(module)
    weight = next(module.parameters())
    weight.data.add_(1.0)
    assert addresses(module) == before
    weight.data = weight.data.clone()
    assert addresses(module) != before


def test_the_graphs_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counter:
        def __init__(self, width: int) -> None:
            self.state = torch.zeros(width)

        def tensors(self) -> list[torch.Tensor]:
            return [self.state]

        def run(self) -> None:
            self.state.add_(1)

    made: list[int] = []

    def captured(graph: StepGraph[Counter], step: Counter, pool: object) -> None:
        made.append(len(step.state))
        graph.step = step
        graph._tensors = step.tensors()

    monkeypatch.setattr(StepGraph, "__init__", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    graphs = StepGraphs()
    first = graphs.graph("key", Counter(1))
    for width in range(2, MOST_GRAPHS + 1):
        graphs.graph("key", Counter(width))
    again = Counter(1)
    again.run()
    assert graphs.graph("key", again) is first
    assert float(first.step.state) == 1.0  # the state of the step that was handed in
    graphs.graph("key", Counter(MOST_GRAPHS + 1))  # the second goes, which was not used since
    graphs.graph("key", Counter(1))
    graphs.graph("other key", Counter(1))
    assert made == [*range(1, MOST_GRAPHS + 2), 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", SITES)
def test_the_optimisation_takes_the_plain_steps(cache_dir: Path, architecture: str, device: str) -> None:
    lm = load(architecture, cache_dir, device)
    site = lm.sites.mlp_out.format(LAYER)
    graphs = StepGraphs()
    for fact in (FIRST, another_of_its_shape(lm), request("A name that is longer", "English"), FIRST):
        expected = steps(descent_of(lm, fact))[0].cpu()
        ours = optimise(lm, [rows_of(lm, fact)], layer=LAYER, sites=[site], settings=SETTINGS, graphs=graphs)[0].deltas[site]
        assert float((ours - expected).norm() / expected.norm()) < 1e-4
    # Four facts, two of them the same and one of the same shape as that; whether the fourth has another is the tokenizer's business.
    assert len(graphs) in ((1, 2) if can_capture(lm.module) else (0,))


@pytest.mark.parametrize("device", DEVICES)
def test_the_optimisation_sees_what_was_written_into_the_weights(cache_dir: Path, device: str) -> None:
    lm = load("llama", cache_dir, device)
    site = lm.sites.mlp_out.format(LAYER)
    graphs = StepGraphs()

    def ours() -> torch.Tensor:
        return optimise(lm, [rows_of(lm, FIRST)], layer=LAYER, sites=[site], settings=SETTINGS, graphs=graphs)[0].deltas[site]

    before = ours()
    with torch.no_grad():
        lm.module.get_submodule(lm.sites.mlp_out.format(LAYER + 1)).weight.mul_(1.5)
    after = ours()
    assert len(graphs) == (1 if can_capture(lm.module) else 0)
    assert float((after - before).norm()) > 1e-3
    assert float((after - steps(descent_of(lm, FIRST))[0].cpu()).norm() / after.norm()) < 1e-4
