"""The upper part of a model as a function of changed linear maps: the layers below the first changed one run once.

A change is a float32 matrix (d_out, d_in) added behind a linear map by a hook; the weights themselves are never written, and no small
update is lost in their precision.

Shapes: B rows, T positions of the longest row, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editeval.keyvalue.suffix import first_tensor, pad_rows
from editeval.models.model import LanguageModel
from editeval.models.trace import capture, run_until

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with beside its hidden states."""


def before(lm: LanguageModel, rows: Sequence[Sequence[int]], *, first: int, last: int) -> tuple[Tensor, dict[int, Call]]:
    """Bring rows (token ids) to layer `first`; return its input (B, T, D), and what each layer up to `last` is called with beside."""
    inputs: dict[int, Tensor] = {}
    calls: dict[int, Call] = {}

    def recorder(layer: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            rest = dict(keywords)
            inputs[layer] = arguments[0] if arguments else rest.pop("hidden_states")
            calls[layer] = (arguments[1:], rest)

        return hook

    ids_BT = pad_rows(rows, lm.input_device)
    with ExitStack() as stack, torch.no_grad():
        for layer in range(first, last + 1):
            module = lm.layer_module(lm.sites.layers, layer)
            stack.callback(module.register_forward_pre_hook(recorder(layer), with_kwargs=True).remove)
        stack.enter_context(capture(lm.module, [lm.sites.layers.format(last)], inputs=True, stop=True))
        run_until(lm.module.base_model, input_ids=ids_BT, use_cache=False)
    return inputs[first], calls


class UpperPass:
    """Rows of tokens standing before layer `first`."""

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]], *, first: int) -> None:
        """Bring the rows (token ids) to layer `first`, in the model's current state."""
        self._layers = [lm.layer_module(lm.sites.layers, layer) for layer in range(first, lm.description.num_layers)]
        self._first_input, self._calls = before(lm, rows, first=first, last=lm.description.num_layers - 1)

    def hidden(self) -> Tensor:
        """Return the last layer's output (B, T, D), with its graph."""
        hidden_BTD = self._first_input
        for layer, (arguments, keywords) in zip(self._layers, self._calls.values(), strict=True):
            hidden_BTD = first_tensor(layer(hidden_BTD, *arguments, **keywords))
        return hidden_BTD


@dataclass(frozen=True)
class Seen:
    """Of the passes within `changed`: what went into each map (B, T, d_in), and what came out (B, T, d_out), to take gradients at."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@contextmanager
def changed(module: nn.Module, deltas: Mapping[str, Tensor]) -> Iterator[Seen]:
    """Within the context the linear maps at these paths act as if their deltas (d_out, d_in) had been written into them."""
    seen = Seen({}, {})

    def adder(path: str, delta_OI: Tensor) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            added: Tensor = arguments[0].float() @ delta_OI.to(output.device).T
            result = (added + output.float()).to(output.dtype)
            seen.inputs[path] = arguments[0].detach()
            seen.outputs[path] = result if result.requires_grad else result.requires_grad_()
            return seen.outputs[path]

        return hook

    with ExitStack() as stack:
        for path, delta in deltas.items():
            stack.callback(module.get_submodule(path).register_forward_hook(adder(path, delta)).remove)
        yield seen
