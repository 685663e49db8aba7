"""KN's scores, GRACE's value and a plain gradient, straight from the papers: oracle of tests and baseline of `edit_speed.py`.

Every step runs the whole model over the whole row, with logits everywhere, and asks autograd for the gradient. The weights are frozen but
for those that a gradient is asked of, so autograd goes back as far as it must and no further: gradients of all weights would only make
these forms slower. Sources: arXiv:2104.08696 (equation 3), arXiv:2211.11031 (section 3), arXiv:2110.11309 (section 3). Independent of
`editeval.keyvalue` and of the methods but for the token positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.straightforward import hooked
from editeval.keyvalue.fine_tuning import TargetRow
from editeval.models.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class FullEntry:
    """A row of GRACE's codebook, key (d_in) and value (d_out), and the loss before each step."""

    key: Tensor
    value: Tensor
    losses: list[float]


def full_grace(
    lm: LanguageModel,
    prompt: Sequence[int],
    target: Sequence[int],
    *,
    site: str,
    start: Tensor,
    num_steps: int,
    learning_rate: float,
    everywhere: bool = False,
) -> FullEntry:
    """Train the value that stands at the site for the prompt's last token, or with `everywhere` for all of the prompt's."""
    inputs = torch.tensor([[*prompt, *target[:-1]]])
    answer = torch.tensor(target)
    end = len(prompt)
    value = start.clone().requires_grad_()
    keys: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], __: Tensor) -> None:
        keys.append(arguments[0][0, end - 1].clone())

    def put(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        changed[0, 0 if everywhere else end - 1 : end] = value
        return changed

    with torch.no_grad(), hooked(lm.module.get_submodule(site), keep):
        lm.module(input_ids=inputs, use_cache=False)
    optimizer = torch.optim.Adam([value], lr=learning_rate)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        with torch.enable_grad(), hooked(lm.module.get_submodule(site), put):
            logits = lm.module(input_ids=inputs, use_cache=False).logits[0].float()
            loss = nn.functional.cross_entropy(logits[end - 1 :], answer)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        optimizer.step()
    return FullEntry(key=keys[0], value=value.detach(), losses=losses)


def plain_gradients(lm: LanguageModel, row: TargetRow, sites: Sequence[str]) -> dict[str, Tensor]:
    """Return, by site, the gradient (d_out, d_in) of the mean loss over the row's scored tokens: one pass forward and backward."""
    weights = [lm.module.get_submodule(site).get_parameter("weight") for site in sites]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = lm.module(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
            loss = nn.functional.cross_entropy(logits[list(row.positions)], torch.tensor(row.tokens))
            gradients = torch.autograd.grad(loss, weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {site: gradient.T if lm.sites.transposed else gradient for site, gradient in zip(sites, gradients, strict=True)}


def looped_scores(lm: LanguageModel, rows: Sequence[TargetRow], *, neurons: str, alphas_M: Tensor) -> Tensor:
    """Return what `neuron_scores` returns, one row, layer and step at a time, by whole passes through the model."""
    return torch.stack([torch.stack(_layers_of_row(lm, row, neurons=neurons, alphas_M=alphas_M)) for row in rows])


def _layers_of_row(lm: LanguageModel, row: TargetRow, *, neurons: str, alphas_M: Tensor) -> list[Tensor]:
    layers = []
    for layer in range(lm.description.num_layers):
        scores = [
            _scores_at(lm, row.input_ids[: position + 1], token, layer, neurons=neurons, alphas_M=alphas_M)
            for position, token in zip(row.positions, row.tokens, strict=True)
        ]
        layers.append(torch.stack(scores).mean(dim=0))
    return layers


def _scores_at(lm: LanguageModel, ids: Sequence[int], token: int, layer: int, *, neurons: str, alphas_M: Tensor) -> Tensor:
    """Return w / m * sum over alpha of dP(token) / dw (neurons), float64, of one layer at the last of these tokens."""
    width = lm.description.intermediate_size
    after = neurons == "activation"
    site = lm.layer_module(lm.sites.mlp_out if after else lm.sites.mlp_in[0], layer)
    seen: list[Tensor] = []
    scaled: list[Tensor] = []

    def look(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen.append((arguments[0] if after else output)[0, -1, :width].detach())

    def put(states: Tensor) -> Tensor:
        changed = states.clone()
        changed[0, -1, :width] = scaled[0]
        return changed

    handle = site.register_forward_hook(look)
    inputs = torch.tensor([ids], device=lm.input_device)
    with torch.no_grad():
        lm.module(input_ids=inputs, use_cache=False)
    handle.remove()
    total = torch.zeros(width, dtype=torch.float64)
    for alpha in alphas_M:
        scaled[:] = [(alpha * seen[0]).requires_grad_()]
        if after:
            handle = site.register_forward_pre_hook(lambda _, arguments: (put(arguments[0]),))
        else:
            handle = site.register_forward_hook(lambda _, arguments, output: put(output))  # noqa: ARG005
        probability = lm.module(input_ids=inputs, use_cache=False).logits[0, -1].float().softmax(dim=0)[token]
        handle.remove()
        (gradient,) = torch.autograd.grad(probability, [scaled[0]])
        total += gradient.double()
    return seen[0].double() * total / len(alphas_M)
