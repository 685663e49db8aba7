"""Training of a hypernetwork along sequences of edits (RLEdit: Li et al. 2025, arXiv:2502.05759, section 3).

The rows of a step are one trajectory: edited one after another, each in the model that the earlier ones left. With W_t the model after edit
t and dW_t the update that the network makes of its gradients in W_{t-1}, the trajectory costs

    sum_t [ sum_{k < memory} decay^k (cedit * edit loss of row t-k + cloc * locality loss of row t-k, both in W_t) + cnorm * |dW_t|^2 ]

so that an update is charged with what it does to the rows before it (memory backtracking), and the network sees gradients of a model
that is edited already. As published, the earlier updates W_{t-1} - W_0 are given: no gradient goes through them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editeval.training.hypernetwork import Factors, Hypernetwork
from editeval.training.hypernetwork_training import Course
from editeval.training.lessons import Lesson, Outcome, acting
from editeval.types import EditRequest


@dataclass(kw_only=True)
class SequenceCourse(Course):
    """A course whose steps are trajectories of `settings.rows_per_step` edits; see the module for `memory`, `decay`, `norm_weight`."""

    memory: int
    decay: float
    norm_weight: float

    def step_loss(self, network: Hypernetwork, requests: Sequence[EditRequest]) -> Tensor:
        """Return the cost of a trajectory over its edits, as a mean; its gradient was taken edit by edit, so that only one is in memory."""
        lessons = [self.lesson(request) for request in requests]  # before anything acts: they are of the unedited model
        written: dict[str, Factors] = {}
        costs = []
        for number, lesson in enumerate(lessons):
            with acting(self.lm.module, written):
                features = lesson.features(self.sites).of_map
                network.observe(features)
                update = network(features)
                costs.append(self._cost(update, lessons[max(0, number + 1 - self.memory) : number + 1]))
            written = joined(written, update)
        return torch.stack(costs).mean()

    def outcomes(self, network: Hypernetwork, requests: Sequence[EditRequest]) -> Iterator[Outcome]:
        """Yield what is left of each row at the end of its trajectory."""
        size = self.settings.rows_per_step
        for start in range(0, len(requests), size):
            lessons = [self.lesson(request) for request in requests[start : start + size]]
            written: dict[str, Factors] = {}
            for lesson in lessons:
                with acting(self.lm.module, written):
                    features = lesson.features(self.sites).of_map
                with torch.no_grad():
                    written = joined(written, network(features))
            with torch.no_grad():
                yield from [lesson.outcome(written) for lesson in lessons]

    def _cost(self, update: Mapping[str, Factors], recent: Sequence[Lesson]) -> Tensor:
        """Return the cost of one update: its value, with the gradient that it has with respect to the network.

        Each lesson is asked with factors of its own, whose gradients are summed: the graph of one lesson at a time.
        """
        leaves = {path: Factors(left=_leaf(factors.left), right=_leaf(factors.right)) for path, factors in update.items()}
        inputs = [side for factors in leaves.values() for side in (factors.left, factors.right)]
        value = self.norm_weight * sum((_squared_norm(factors) for factors in leaves.values()), torch.zeros((), device=inputs[0].device))
        gradients = list(torch.autograd.grad(value, inputs))
        for age, lesson in enumerate(reversed(recent)):
            cost = self.decay**age * self.weighed(lesson.outcome(leaves))
            gradients = [known + new for known, new in zip(gradients, torch.autograd.grad(cost, inputs), strict=True)]
            value = value + cost.detach()
        outputs = [side for factors in update.values() for side in (factors.left, factors.right)]
        carried = torch.stack([(gradient * output).sum() for gradient, output in zip(gradients, outputs, strict=True)]).sum()
        return carried + (value - carried).detach()


def joined(written: Mapping[str, Factors], update: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return updates that do what both do, without a graph."""
    found = dict(written)
    for path, factors in update.items():
        left, right = factors.left.detach(), factors.right.detach()
        earlier = written.get(path)
        both = (left, right) if earlier is None else (torch.cat([earlier.left, left], dim=1), torch.cat([earlier.right, right]))
        found[path] = Factors(left=both[0], right=both[1])
    return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _squared_norm(factors: Factors) -> Tensor:
    """Return |left right|^2 without forming the product."""
    return ((factors.left.T @ factors.left) * (factors.right @ factors.right.T)).sum()
