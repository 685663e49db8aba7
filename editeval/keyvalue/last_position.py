"""The model as a function of what one layer holds at the last position of a row: only that position runs, from that layer up.

A causal model's earlier positions do not depend on the last one. One pass through the whole model gives their attention keys and values
for every layer; copies of a row (such as the steps of an integral) then share them.

Shapes: B rows, M copies of each, T positions of the longest row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editeval.keyvalue.suffix import Cut, FrozenPrefix, call_recorder, first_tensor, next_token_logits, pad_rows, require_masks
from editeval.models.model import LanguageModel
from editeval.models.trace import capture


class LastPositionPass:
    """Rows of tokens, computed once.

    `inputs` and `outputs` hold, by path of a site, what went in and came out at the last position (B, D).
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]], *, sites: Sequence[str]) -> None:
        """Run the whole model once over `rows` (token ids).

        Raises:
            EditError: an attention kernel without masks.
        """
        require_masks(lm)
        self._lm = lm
        self._layers = [lm.layer_module(lm.sites.layers, layer) for layer in range(lm.description.num_layers)]
        layer_paths = [lm.sites.layers.format(layer) for layer in range(lm.description.num_layers)]
        ids_BT = pad_rows(rows, lm.input_device)
        self._width = ids_BT.shape[1]
        self._last_B = torch.tensor([len(row) - 1 for row in rows], device=ids_BT.device)
        cache = DynamicCache()
        self._calls: dict[int, dict[str, Any]] = {}
        with ExitStack() as stack, torch.no_grad():
            for number, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_pre_hook(call_recorder(self._calls, number), with_kwargs=True).remove)
            trace = stack.enter_context(capture(lm.module, [*sites, *layer_paths], inputs=True, outputs=True))
            lm.module.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        self.inputs = {path: self._at_last(trace.inputs[path]) for path in sites}
        self.outputs = {path: self._at_last(trace.outputs[path]) for path in sites}
        self._layer_inputs = [self._at_last(trace.inputs[path]) for path in layer_paths]
        self._num_prefix = int(self._last_B.max())
        self._frozen = FrozenPrefix(cache, layer=0, num_prefix=self._num_prefix)
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def logits(self, layer: int, *, copies: int, change: AbstractContextManager[None]) -> Tensor:
        """Return the next token's logits (M * B, vocabulary), float32, when the last position runs from `layer` up within `change`.

        Copy m of row b is row m * B + b; modules see (M * B, 1, D).
        """
        arguments = self._arguments_for(copies)
        hidden = self._layer_inputs[layer].repeat(copies, 1)[:, None]
        with change:
            for number in range(layer, len(self._layers)):
                hidden = first_tensor(self._layers[number](hidden, **arguments[number]))
        return next_token_logits(self._lm, hidden[:, 0])

    def _arguments_for(self, copies: int) -> list[dict[str, Any]]:
        if copies not in self._arguments:
            starts = self._last_B.repeat(copies)
            cut = Cut(starts_B=starts, lengths_B=starts + 1, num_prefix=self._num_prefix, num_suffix=1, width=self._width)
            self._arguments = {copies: [cut.arguments(self._calls[number], self._frozen) for number in range(len(self._layers))]}
        return self._arguments[copies]

    def _at_last(self, states_BTD: Tensor) -> Tensor:
        last_B = self._last_B.to(states_BTD.device)
        return states_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
