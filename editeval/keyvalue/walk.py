"""Up the edited layers with the updates found so far, writing no weight.

A method that spreads an edit over several layers needs the keys of each layer, and what is still missing at the last one, after
the layers below were updated. The rows end at the subject's last token: attention is causal, so nothing behind it matters there.
One pass brings them to the first edited layer; then only the edited layers run, each update a low-rank term behind its linear map.

Shapes: E facts, B rows, T positions of the longest row, K the key's width, D the value's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from editeval.edits.delta import LowRankDelta
from editeval.keyvalue.objective import FactRows
from editeval.keyvalue.suffix import first_tensor
from editeval.keyvalue.upper import before
from editeval.models.model import LanguageModel
from editeval.models.trace import capture, run_until

ROW_TOKENS = 8192
"""Tokens of rows that share a pass, padding counted."""


class Factored(Protocol):
    """An update of a linear map: left (d_out, N) @ right (N, d_in)."""

    @property
    def left(self) -> Tensor:
        """The factor of the map's outputs."""
        ...

    @property
    def right(self) -> Tensor:
        """The factor of the map's inputs."""
        ...


Updates = Mapping[str, Sequence[Factored]]


class LayerWalk:
    """Rows standing before one layer, `layer`, with every update of the layers below it in them."""

    def __init__(self, lm: LanguageModel, facts: Sequence[FactRows], *, first: int, last: int, group_sizes: Sequence[int] = ()) -> None:
        """Bring the rows of `facts` to layer `first`; `last` is the highest layer that will be asked for.

        Behind the bare prompt, each fact's rows stand in groups of `group_sizes`; empty: they are one group.
        """
        self.layer = first
        self._lm = lm
        self._last = last
        self._num_facts = len(facts)
        self._added: dict[str, list[LowRankDelta]] = {}
        bare = [fact.prompts[0].token_ids[: fact.prompts[0].subject_last + 1] for fact in facts]
        prefixed = [row.token_ids[: row.subject_last + 1] for fact in facts for row in fact.prompts[1:]]
        self._bare = _batches(lm, bare, first=first, last=last)
        self._prefixed = _batches(lm, prefixed, first=first, last=last)
        self._group_sizes = list(group_sizes) or [len(prefixed) // len(facts)]

    def keys(self, site: str) -> Tensor:
        """Return the keys (E, K), float32, that the linear map at `site` (in the current layer) gets at the subject's last token.

        As published with MEMIT, a mean over groups: the bare prompt counts as much as all context prefixes of one length together.
        """
        bare_EK = self._gather(self._bare, site, inputs=True)
        if not self._prefixed:
            return bare_EK
        prefixed_EPK = self._gather(self._prefixed, site, inputs=True).reshape(self._num_facts, sum(self._group_sizes), -1)
        means = [group_EGK.mean(dim=1) for group_EGK in torch.split(prefixed_EPK, self._group_sizes, dim=1)]
        return torch.stack([bare_EK, *means]).mean(dim=0)

    def values(self, site: str) -> Tensor:
        """Return the outputs (E, D), float32, of a module in the last layer at the subject's last token of the bare prompt."""
        return self._gather(self._bare, site, inputs=False)

    def add(self, update: LowRankDelta) -> None:
        """Let everything from the current layer on see this update of one of the layer's linear maps."""
        self._added.setdefault(update.parameter.removesuffix(".weight"), []).append(update)

    def advance(self) -> None:
        """Step to the next layer."""
        for batch in (*self._bare, *self._prefixed):
            batch.hidden = self._run(batch, self.layer, batch.hidden)
        self._added.clear()
        self.layer += 1

    def _gather(self, batches: Sequence[_Batch], site: str, *, inputs: bool) -> Tensor:
        """Run rows from the current layer until the site was seen; return what went in or came out at the rows' last tokens."""
        parts: list[Tensor] = []
        for batch in batches:
            with capture(self._lm.module, [site], inputs=inputs, outputs=not inputs, stop=True) as trace:
                run_until(partial(self._run_from_here, batch))
            parts.append(batch.at_end((trace.inputs if inputs else trace.outputs)[site]).float())
        order = torch.tensor([number for batch in batches for number in batch.numbers])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    def _run_from_here(self, batch: _Batch) -> None:
        hidden = batch.hidden
        for layer in range(self.layer, self._last + 1):
            hidden = self._run(batch, layer, hidden)

    def _run(self, batch: _Batch, layer: int, hidden_BTD: Tensor) -> Tensor:
        arguments, keywords = batch.calls[layer]
        with torch.no_grad(), updated(self._lm.module, self._added if layer == self.layer else {}):
            return first_tensor(self._lm.layer_module(self._lm.sites.layers, layer)(hidden_BTD, *arguments, **keywords))


class _Batch:
    """Rows of one forward pass: where they stand, and what each layer is called with beside them."""

    def __init__(self, lm: LanguageModel, numbers: list[int], rows: Sequence[Sequence[int]], *, first: int, last: int) -> None:
        self.numbers = numbers
        self._ends = torch.tensor([len(row) - 1 for row in rows])
        self.hidden, self.calls = before(lm, rows, first=first, last=last)

    def at_end(self, states_BTX: Tensor) -> Tensor:
        """Return the states at each row's last token."""
        ends = self._ends.to(states_BTX.device)
        return states_BTX[torch.arange(len(ends), device=ends.device), ends]


def _batches(lm: LanguageModel, rows: Sequence[Sequence[int]], *, first: int, last: int) -> list[_Batch]:
    """Group rows of like length, so that little is padding."""
    groups: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
        if not groups or (len(groups[-1]) + 1) * len(rows[number]) > ROW_TOKENS:
            groups.append([])
        groups[-1].append(number)
    return [_Batch(lm, group, [rows[number] for number in group], first=first, last=last) for group in groups]


@contextmanager
def updated(module: nn.Module, updates: Updates) -> Iterator[None]:
    """Within the context the linear maps at these paths act as if their updates had been written into them."""

    def adder(deltas: Sequence[Factored]) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            keys, sum_ = arguments[0].float(), output.float()
            for delta in deltas:
                sum_ = sum_ + (keys @ delta.right.to(keys.device).T) @ delta.left.to(keys.device).T
            return sum_.to(output.dtype)

        return hook

    with ExitStack() as stack:
        for path, deltas in updates.items():
            stack.callback(module.get_submodule(path).register_forward_hook(adder(deltas)).remove)
        yield
