"""ROME written straight from the paper, with nothing saved: the oracle of the tests and the baseline of `edit_speed.py`.

Every step runs the whole model forward and backward over every position of every prompt, with logits everywhere; each edit solves a
dense system with C in float64. Source: Meng et al. 2022, arXiv:2202.05262, section 3.1. Independent of `editeval.keyvalue` but for the
token positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editeval.keyvalue.lookup import Located
from editeval.keyvalue.objective import FactRows, TargetSettings
from editeval.models.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class FullResult:
    """What the plain optimisation found: deltas by site, and the total loss at each evaluation."""

    deltas: dict[str, Tensor]
    losses: list[float]


@dataclass(frozen=True, kw_only=True)
class FullUpdate:
    """A rank-one update: left (d_out), right (d_in)."""

    left: Tensor
    right: Tensor
    result: FullResult


def full_target_value(lm: LanguageModel, fact: FactRows, *, sites: Sequence[str], settings: TargetSettings) -> FullResult:
    """Optimise deltas at `sites` over whole sequences, the published loop's last, idle evaluation included."""
    rows = [*fact.prompts, fact.essence]
    ids, mask = _padded(lm, rows)
    lookups = torch.tensor([row.subject_last for row in rows])
    initial = {site: outputs[0] for site, outputs in _states(lm, rows, sites, outputs=True).items()}
    deltas = {site: torch.zeros_like(value, requires_grad=True) for site, value in initial.items()}
    optimizer = torch.optim.Adam(list(deltas.values()), lr=settings.learning_rate)
    kept: Tensor | None = None
    losses: list[float] = []
    nll_factor = 1.0
    for step in range(settings.num_steps):
        optimizer.zero_grad()
        with ExitStack() as stack, torch.enable_grad():
            for site in sites:
                stack.enter_context(hooked(lm.module.get_submodule(site), _add_at(lookups, deltas[site])))
            log_probs = lm.module(input_ids=ids, attention_mask=mask).logits.float().log_softmax(dim=-1)
            nll = torch.stack([_negative_log_likelihood(log_probs[number], row) for number, row in enumerate(fact.prompts)]).mean()
            essence = log_probs[-1, fact.essence.subject_last]
            kept = essence.detach().clone() if kept is None else kept
            kl = nn.functional.kl_div(kept, essence, log_target=True, reduction="sum")
            decay = sum((delta.norm() / initial[site].norm() ** 2 for site, delta in deltas.items()), torch.zeros((), device=ids.device))
            loss = nll_factor * nll + settings.kl_factor * kl + settings.weight_decay * decay
        losses.append(loss.item())
        if losses[-1] < settings.early_stop_loss or step == settings.num_steps - 1:
            break
        written = all(_is_written(log_probs[number], row) for number, row in enumerate(fact.prompts))
        if written and settings.written_kl is not None and settings.kl_factor * kl.item() <= settings.written_kl:
            break
        if settings.written_nll_factor is not None:
            nll_factor = settings.written_nll_factor if written else 1.0
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for site, delta in deltas.items():
                limit = settings.clamp_norm_factor * initial[site].norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    return FullResult(deltas={site: delta.detach() for site, delta in deltas.items()}, losses=losses)


def full_rome(lm: LanguageModel, fact: FactRows, *, site: str, settings: TargetSettings, covariance: Tensor) -> FullUpdate:
    """Compute ROME's update as published: u from the mean key, by a dense float64 solve, and the division by the bare prompt's key."""
    keys = _states(lm, fact.prompts, [site], outputs=False)[site]
    direction = torch.linalg.solve(covariance.double(), keys.mean(dim=0).double())
    direction = direction / direction.norm()
    result = full_target_value(lm, fact, sites=[site], settings=settings)
    key = _states(lm, fact.prompts[:1], [site], outputs=False)[site][0]
    # The delta was optimised from the value at the bare prompt, so it is the target minus the current value there.
    left = result.deltas[site].double()
    return FullUpdate(left=left / (direction @ key.double()), right=direction, result=result)


def _negative_log_likelihood(log_probs: Tensor, row: Located) -> Tensor:
    chosen = [log_probs[position, token] for position, token in zip(row.scored_positions, row.target_ids, strict=True)]
    return -torch.stack(chosen).mean()


def _is_written(log_probs: Tensor, row: Located) -> bool:
    return all(log_probs[position].argmax() == token for position, token in zip(row.scored_positions, row.target_ids, strict=True))


def _states(lm: LanguageModel, rows: Sequence[Located], sites: Sequence[str], *, outputs: bool) -> dict[str, Tensor]:
    """Return what went into, or came out of, each site at the subject's last token, from one pass over the whole model."""
    ids, mask = _padded(lm, rows)
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            states = _first(output) if outputs else arguments[0]
            seen[site] = torch.stack([states[number, row.subject_last] for number, row in enumerate(rows)]).detach().clone()

        return hook

    with ExitStack() as stack, torch.no_grad():
        for site in sites:
            stack.enter_context(hooked(lm.module.get_submodule(site), keep(site)))
        lm.module(input_ids=ids, attention_mask=mask)
    return seen


def _padded(lm: LanguageModel, rows: Sequence[Located]) -> tuple[Tensor, Tensor]:
    width = max(len(row.input_ids) for row in rows)
    pad = lm.tokenizer.pad_token_id or 0
    device = lm.input_device
    ids = torch.tensor([[*row.input_ids, *[pad] * (width - len(row.input_ids))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    return ids, mask


def _add_at(lookups: Tensor, delta: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        states = _first(output).clone()
        states[torch.arange(len(lookups)), lookups] += delta
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook


def _first(output: Any) -> Tensor:
    states = output[0] if isinstance(output, tuple) else output
    assert isinstance(states, Tensor)
    return states


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Within the context a module has this forward hook."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
