"""Which facts, and in which order: a permutation by content and seed, and the filter that keeps what a model knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from editeval.datasets.text import starts_with_answer
from editeval.types import DatasetError, EditRequest, seed_for


def order(requests: Sequence[EditRequest], seed: int) -> tuple[EditRequest, ...]:
    """Return the requests in editing order: sorted by a hash of (seed, request id).

    The order depends on nothing else, neither on the order of the file nor on how many facts will be edited: the first n of it
    are a prefix of the first m, and leaving some requests out never moves the others.
    """
    return tuple(sorted(requests, key=lambda request: (seed_for("order", seed, request.request_id), request.request_id)))


def known(requests: Sequence[EditRequest], keep: Collection[str]) -> tuple[EditRequest, ...]:
    """Return the requests whose id is in `keep`, in their order."""
    ids = frozenset(keep)
    return tuple(request for request in requests if request.request_id in ids)


def known_requests(requests: Sequence[EditRequest], complete: Callable[[Sequence[str]], list[str]]) -> tuple[EditRequest, ...]:
    """Return the requests whose true target begins the model's own completion of the prompt, in their order.

    `complete` continues prompts greedily, one text for each, in order; it is called once with all of them. Facts without a true
    target are left out, for nothing says that the model knows them.

    Raises:
        DatasetError: no request has a true target, or `complete` returned another number of texts.
    """
    candidates = [(request, request.target_true) for request in requests if request.target_true is not None]
    if not candidates:
        raise DatasetError(
            f"none of the {len(requests)} facts has a true target, so it cannot be asked which of them the model knows; "
            "set dataset.known_only=false"
        )
    completions = complete([request.full_prompt for request, _ in candidates])
    if len(completions) != len(candidates):
        raise DatasetError(f"{len(candidates)} prompts were given to the model, and {len(completions)} completions came back; one for each")
    return tuple(
        request
        for (request, target_true), completion in zip(candidates, completions, strict=True)
        if starts_with_answer(completion, target_true)
    )
