"""Adam on deltas, within their norms: how a target value's loss is minimised (ROME, section 3.1, step 2).

On a GPU an evaluation and its step are captured as one graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from editeval.edits.adam import corrected_adam, corrections, new_moments
from editeval.keyvalue.graphs import StepGraphs
from editeval.keyvalue.objective import Objective, TargetSettings


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found, on the CPU: total, nll, kl and weight decay (E, 4), and which facts go on (E)."""

    losses: Tensor
    active: Tensor


class Descent:
    """Adam on the deltas of E facts, within their norms; a fact whose loss is low enough stays where it is."""

    def __init__(self, objective: Objective, settings: TargetSettings) -> None:
        self.deltas = objective.zeros()
        self._objective = objective
        self._settings = settings
        device = objective.device
        self._moments = {site: new_moments(delta) for site, delta in self.deltas.items()}
        self._limits = {site: settings.clamp_norm_factor * initial.norm(dim=1) for site, initial in objective.initial.items()}
        self._active_E = torch.ones(len(next(iter(self.deltas.values()))), dtype=torch.bool, device=device)
        self._losses_E4 = torch.zeros(len(self._active_E), 4, device=device)
        self._nll_factor_E = torch.ones(len(self._active_E), device=device)
        self._next_factor_E = self._nll_factor_E
        steps = range(1, settings.num_steps)
        factors = [corrections(step=step, learning_rate=settings.learning_rate) for step in steps]
        self._factors = {site: torch.tensor(factors, device=delta.device) for site, delta in self.deltas.items()}
        self._step = {site: torch.zeros(1, dtype=torch.long, device=delta.device) for site, delta in self.deltas.items()}
        self._leaves: dict[str, Tensor] = {}
        self._total_E: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return the state, and what the objective reads."""
        moments = [moment for pair in self._moments.values() for moment in pair]
        own = [self._active_E, self._losses_E4, self._nll_factor_E, *moments]
        for by_site in (self.deltas, self._limits, self._factors, self._step):
            own += list(by_site.values())
        return [*own, *self._objective.tensors()]

    def evaluate(self) -> Evaluation:
        """Look at the loss where the deltas are."""
        self._look()
        return self.seen()

    def seen(self) -> Evaluation:
        """Return what the last look found."""
        return Evaluation(losses=self._losses_E4.to("cpu", copy=True), active=self._active_E.to("cpu", copy=True))

    def run(self) -> None:
        """Look and move."""
        self._look()
        self.move()

    def move(self) -> None:
        """Take the step of the last look."""
        assert self._total_E is not None
        gradients = torch.autograd.grad(self._total_E.sum(), list(self._leaves.values()))
        self._total_E = None
        with torch.no_grad():
            self._nll_factor_E.copy_(self._next_factor_E)
            for (site, delta), gradient in zip(self.deltas.items(), gradients, strict=True):
                factors = self._factors[site].index_select(0, self._step[site])[0]
                self._step[site].add_(1)
                moved = corrected_adam(delta, gradient, self._moments[site], tuple(factors))
                moved = moved * (self._limits[site] / moved.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None]
                delta.copy_(torch.where(self._active_E.to(delta.device)[:, None], moved, delta))

    def _look(self) -> None:
        # Made anew for each look: autograd remembers the stream that a leaf was first used on, and a graph is captured on its own.
        self._leaves = {site: delta.detach().requires_grad_() for site, delta in self.deltas.items()}
        terms = self._objective.terms(self._leaves)
        self._total_E = terms.total(self._nll_factor_E)
        with torch.no_grad():
            self._losses_E4.copy_(torch.stack([self._total_E, terms.nll, terms.kl, terms.weight_decay], dim=1))
            self._active_E.logical_and_(self._total_E >= self._settings.early_stop_loss)
            if self._settings.written_kl is not None:
                self._active_E.logical_and_(~(terms.written & (terms.kl <= self._settings.written_kl)))
            if self._settings.written_nll_factor is not None:
                self._next_factor_E = torch.where(terms.written, self._settings.written_nll_factor, 1.0)


class CapturedDescent:
    """The same on a GPU: an evaluation and its step are one graph, captured once for each shape."""

    def __init__(self, descent: Descent, graphs: StepGraphs, *, key: Hashable) -> None:
        descent.evaluate()  # at zero: what the KL term keeps is one of the tensors from now on
        self._graph = graphs.graph(key, descent)
        self._descent: Descent = self._graph.step  # the first of its shape

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        """The deltas as they are now (E, d_out), by site."""
        return self._descent.deltas

    def evaluate(self) -> Evaluation:
        """Look at the loss where the deltas are, and take the step."""
        self._graph.replay()
        return self._descent.seen()

    def move(self) -> None:
        """Do nothing: the step was taken."""
