"""How much each neuron of the MLPs adds to the probability of an answer: integrated gradients.

Dai et al. 2022, "Knowledge Neurons in Pretrained Transformers", arXiv:2104.08696, section 3.2.

With w the neurons of one layer at the position that predicts the answer o, all scaled together from 0 to what they are,

    score_i = w_i / m  sum_k  d P(o | alpha_k w) / d w_i

with alpha_k = k / m for k = 1 ... m (equation 3), or m points from 0 to 1, both ends counted, as in later code. An answer of several tokens
has the mean of their scores, each at the position that predicts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from editeval.keyvalue.fine_tuning import TargetRow
from editeval.keyvalue.last_position import LastPositionPass
from editeval.models.model import LanguageModel, from_packed_weights
from editeval.models.trace import replace_output

NEURONS: Mapping[str, str] = {
    "activation": "what the MLP's output matrix gets, as in the paper: after the activation function (and the gate)",
    "preactivation": "what the (first) map into the MLP gives, as in later code",
}
POINTS: Mapping[str, str] = {
    "right": "1/m, 2/m ... 1, as in the paper",
    "ends": "m points from 0 to 1, both counted, as in later code; a single one is 0",
}
ROWS_PER_PASS = 256
"""Copies of rows that share a pass through the upper layers."""


def integration_points(steps: int, points: str) -> Tensor:
    """Return alpha_1 ... alpha_m; `points` is one of `POINTS`."""
    return torch.linspace(0, 1, steps) if points == "ends" else torch.arange(1, steps + 1) / steps


@from_packed_weights
def neuron_scores(lm: LanguageModel, rows: Sequence[TargetRow], *, neurons: str, alphas_M: Tensor) -> Tensor:
    """Return the scores (rows, layers, neurons), float64 on the CPU; `neurons` is one of `NEURONS`."""
    asked = [(number, position) for number, row in enumerate(rows) for position in dict.fromkeys(row.positions)]
    inputs = [rows[number].input_ids[: position + 1] for number, position in asked]
    answers = [
        [token for at, token in zip(rows[number].positions, rows[number].tokens, strict=True) if at == position]
        for number, position in asked
    ]
    template = lm.sites.mlp_out if neurons == "activation" else lm.sites.mlp_in[0]
    sites = [template.format(layer) for layer in range(lm.description.num_layers)]
    passed = LastPositionPass(lm, inputs, sites=sites)
    width = lm.description.intermediate_size
    of_row = torch.tensor([number for number, _ in asked])
    num_tokens = torch.tensor([len(row.tokens) for row in rows])
    layers = []
    for layer, site in enumerate(sites):
        states_BN = (passed.inputs if neurons == "activation" else passed.outputs)[site][:, :width]
        gradients_BN = _summed_gradients(lm, passed, layer, site, states_BN, answers, neurons=neurons, alphas_M=alphas_M)
        scores_BN = (states_BN.double() * gradients_BN / len(alphas_M)).cpu()
        layers.append(torch.zeros(len(rows), width, dtype=torch.float64).index_add(0, of_row, scores_BN) / num_tokens[:, None])
    return torch.stack(layers, dim=1)


def _summed_gradients(
    lm: LanguageModel,
    passed: LastPositionPass,
    layer: int,
    site: str,
    states_BN: Tensor,
    answers: Sequence[Sequence[int]],
    *,
    neurons: str,
    alphas_M: Tensor,
) -> Tensor:
    """Return the sum over alpha of dP / dw (B, N), float64; P is the sum of the probabilities of a row's tokens."""
    total_BN = torch.zeros(states_BN.shape, dtype=torch.float64, device=states_BN.device)
    # Each row's tokens, filled up with its first one, and where they are such filling.
    most = max(len(tokens) for tokens in answers)
    tokens_BL = torch.tensor([[*tokens, *[tokens[0]] * (most - len(tokens))] for tokens in answers])
    filled_BL = torch.tensor([[number >= len(tokens) for number in range(most)] for tokens in answers])
    for alphas in torch.split(alphas_M, max(1, ROWS_PER_PASS // len(states_BN))):
        scaled = (alphas.to(states_BN.device)[:, None, None] * states_BN.float()).to(states_BN.dtype).flatten(0, 1).requires_grad_()
        change = _input_replaced(lm.module, site, scaled) if neurons == "activation" else replace_output(lm.module, site, _first(scaled))
        with torch.enable_grad():
            log_probs = passed.logits(layer, copies=len(alphas), change=change).log_softmax(dim=-1)
            # The gradient of log P is of a size that half precision can hold; P itself may be too small for float32 in a broken model.
            own = log_probs.gather(1, tokens_BL.repeat(len(alphas), 1).to(log_probs.device))
            answered = own.masked_fill(filled_BL.repeat(len(alphas), 1).to(own.device), -torch.inf).logsumexp(dim=1)
            (gradient,) = torch.autograd.grad(answered.sum(), [scaled])
        weighted = gradient.double() * answered.detach().double().exp().to(gradient.device)[:, None]
        total_BN += weighted.reshape(len(alphas), *states_BN.shape).sum(dim=0)
    return total_BN


def _first(scaled: Tensor) -> Any:
    """Return what puts `scaled` in the place of a map's output, or of its first part where gate and up are one map."""

    def replaced(output: Tensor) -> Tensor:
        return torch.cat([scaled[:, None], output[..., scaled.shape[1] :]], dim=-1)

    return replaced


@contextmanager
def _input_replaced(module: nn.Module, path: str, scaled: Tensor) -> Iterator[None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (scaled[:, None], *arguments[1:])

    handle = module.get_submodule(path).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
