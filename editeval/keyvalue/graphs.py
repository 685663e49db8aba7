"""Steps of an optimisation as CUDA graphs: captured once for each shape, replayed for everything of that shape.

An optimisation over a few positions is hundreds of small kernels a step, and launching them takes longer than they run. A graph launches
them at once. It reads and writes fixed addresses, so what is optimised next is copied to where the first of its shape lay; the model's
weights are read where they are, in their current state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

MOST_GRAPHS = 8
"""Shapes kept for an editor: each holds the attention keys and values of its rows."""


class Step(Protocol):
    """One step of an optimisation, whose whole state is in tensors."""

    def tensors(self) -> Sequence[Tensor]:
        """Return what a step reads and what it changes, the model's own tensors left out, in an order that shapes alone decide."""
        ...

    def run(self) -> None:
        """Take a step in place: nothing is read on the host, nothing is moved between devices."""
        ...


S = TypeVar("S", bound=Step)


class StepGraph(Generic[S]):
    """A step that was captured; `step` is the one at whose addresses it runs."""

    def __init__(self, step: S, pool: Any) -> None:
        """Run the step once to warm up, capture it, and put its state back."""
        self.step = step
        self._tensors = list(step.tensors())
        device = self._tensors[0].device
        before = [tensor.detach().clone() for tensor in self._tensors]
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step.run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                step.run()
        self._load(before)

    def adopt(self, step: S) -> None:
        """Continue with another step of the same shapes, from its state."""
        self._load(step.tensors())

    def replay(self) -> None:
        """Take a step."""
        self._graph.replay()

    def _load(self, tensors: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, list(tensors))


class StepGraphs:
    """The graphs that an editor has captured, those used last; they share their scratch memory, and go with the editor."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, StepGraph[Any]] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def graph(self, key: Hashable, step: Step) -> StepGraph[Any]:
        """Return the graph of this key and these shapes, with the state of `step`."""
        whole = (key, tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in step.tensors()))
        if whole in self._graphs:
            self._graphs[whole].adopt(step)
        else:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[whole] = StepGraph(step, self._pool)
        self._graphs.move_to_end(whole)
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return self._graphs[whole]


def can_capture(module: nn.Module) -> bool:
    """Return whether the whole model lies on one CUDA device."""
    devices = {parameter.device for parameter in module.parameters()}
    return len(devices) == 1 and next(iter(devices)).type == "cuda"


def addresses(module: nn.Module) -> tuple[int, ...]:
    """Return where the model's own tensors lie: a graph of a model whose weights were put elsewhere would read the old ones."""
    return tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))
