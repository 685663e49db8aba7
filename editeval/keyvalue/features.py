"""What linear maps get and what the loss wants of what they give: the editing features of gradient-based methods.

For a fact, the hidden states that go into a linear map and the gradients of the loss at its output, at every position of prompt and
target: the gradient of the map's weight is the sum of their outer products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editeval.keyvalue.fine_tuning import TargetRow
from editeval.keyvalue.suffix import next_token_logits, pad_rows
from editeval.keyvalue.upper import UpperPass
from editeval.models.model import LanguageModel, from_packed_weights
from editeval.models.trace import capture
from editeval.types import EditError


@dataclass(frozen=True, kw_only=True)
class Features:
    """Of N positions: `inputs` (N, d_in) and `gradients` (N, d_out), float32."""

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True, kw_only=True)
class EditingFeatures:
    """Features by path of the map, and the mean loss of the rows, in nats."""

    of_map: Mapping[str, Features]
    loss: float


@from_packed_weights
def editing_features(
    lm: LanguageModel, rows: Sequence[TargetRow], sites: Sequence[str], *, upper: UpperPass | None = None
) -> EditingFeatures:
    """Run rows forward and backward once. Each row has a loss of its own, the mean over its target tokens, whatever it runs with.

    `upper` holds the same rows, standing before a layer at or below the sites: what is below then does not run again.

    Raises:
        EditError: with the ids of the rows, when the loss is not a finite number.
    """
    ids_BT = pad_rows([row.input_ids for row in rows], lm.input_device)
    real_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([len(row.input_ids) for row in rows])[:, None]
    scored = [(number, *pair) for number, row in enumerate(rows) for pair in zip(row.positions, row.tokens, strict=True)]
    numbers, positions, tokens = (torch.tensor(part) for part in zip(*scored, strict=True))
    weights = torch.tensor([1 / len(rows[number].tokens) for number, _, _ in scored])
    last_layer = lm.sites.layers.format(lm.description.num_layers - 1)
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), ExitStack() as stack:
        for site in sites:
            stack.callback(lm.module.get_submodule(site).register_forward_hook(_leaf(outputs, site)).remove)
        trace = stack.enter_context(capture(lm.module, list(sites), inputs=True))
        last = stack.enter_context(capture(lm.module, [last_layer], outputs=True, detach=False))
        if upper is None:
            lm.module.base_model(input_ids=ids_BT, use_cache=False)
        else:
            upper.hidden()
        hidden_BTD = last.outputs[last_layer]
        chosen_ND = hidden_BTD[numbers.to(hidden_BTD.device), positions.to(hidden_BTD.device)]
        log_probs = next_token_logits(lm, chosen_ND).log_softmax(dim=-1)
        loss = -(log_probs.gather(1, tokens.to(log_probs.device)[:, None])[:, 0] * weights.to(log_probs.device)).sum()
        if not bool(torch.isfinite(loss)):
            raise EditError(
                f"the loss is {float(loss.detach())}; the model may be broken by earlier edits",
                request_ids=[row.request_id for row in rows],
            )
        gradients = torch.autograd.grad(loss, [outputs[site] for site in sites])
    return EditingFeatures(
        of_map={
            site: Features(
                inputs=trace.inputs[site][real_BT.to(gradient.device)].float(), gradients=gradient[real_BT.to(gradient.device)].float()
            )
            for site, gradient in zip(sites, gradients, strict=True)
        },
        loss=float(loss.detach()) / len(rows),
    )


def _leaf(outputs: dict[str, Tensor], site: str) -> Any:
    """Return a hook that keeps a map's output as something that gradients can be taken at."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        outputs[site] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[site]

    return hook
