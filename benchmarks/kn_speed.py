"""Seconds of KN's integrated gradients, batched against a loop over layers and steps, with the same scores.

    python benchmarks/kn_speed.py                     # SmolLM2
    python benchmarks/kn_speed.py --model xl-wide --facts 1

The loop does what the definition says: for each layer and each step it runs the whole model over the whole row, with the layer's neurons
scaled at the last position, and takes the gradient. Prints a line a fact, and one line of JSON; ends with status 1 when the scores
differ by more than 1e-4, or when batching is less than 4 times as fast.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch
from torch import Tensor, nn

from editeval.keyvalue.attribution import integration_points, neuron_scores
from editeval.keyvalue.fine_tuning import TargetRow, scored_row
from editeval.keyvalue.lookup import locate
from editeval.models.model import LanguageModel

TOLERANCE = 1e-4
FASTER = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both on a few facts."""
    from benchmarks.edit_speed import FACTS, MODELS, relative, timed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--facts", type=int, default=2, help=f"at most {len(FACTS)}")
    parser.add_argument("--steps", type=int, default=20, help="steps of the integral (published: 20)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: its own choice")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    lm = MODELS[options.model]()
    alphas = integration_points(options.steps, "right")
    batched_seconds, looped_seconds, differences = [], [], []
    for prompt, subject, target in FACTS[: options.facts]:
        row = scored_row(locate(lm.tokenizer, prompt, subject, target=target), scored_at="target")
        batched, clock = timed(lambda: neuron_scores(lm, [row], neurons="activation", alphas_M=alphas))  # noqa: B023  (called at once)
        batched_seconds.append(clock.wall)
        looped, clock = timed(lambda: looped_scores(lm, [row], neurons="activation", alphas_M=alphas))  # noqa: B023
        looped_seconds.append(clock.wall)
        differences.append(relative(batched, looped))
        print(f"{subject}: {batched_seconds[-1]:.2f} s against {looped_seconds[-1]:.2f} s", flush=True)
    speedup = fmean(looped_seconds) / fmean(batched_seconds)
    good = max(differences) < TOLERANCE and speedup >= FASTER
    record = {
        "model": lm.description.name,
        "steps": options.steps,
        "facts": len(differences),
        "threads": torch.get_num_threads(),
        "batched_seconds": fmean(batched_seconds),
        "looped_seconds": fmean(looped_seconds),
        "speedup": speedup,
        "largest_difference": max(differences),
        "good": good,
    }
    print(json.dumps(record))
    return 0 if good else 1


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
    inputs = torch.tensor([ids], device=lm.device_of(lm.module.get_submodule(lm.sites.embedding)))
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


if __name__ == "__main__":
    sys.exit(main())
