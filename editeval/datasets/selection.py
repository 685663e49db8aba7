"""Which facts, and in which order: a permutation by content and seed, and the filter that keeps what a model knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

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


def known_requests(
    requests: Sequence[EditRequest], says: Callable[[Sequence[str], Sequence[str]], Sequence[bool]]
) -> tuple[EditRequest, ...]:
    """Return the requests whose true target is what the model itself says after the prompt, in their order.

    `says(prompts, answers)` tells of each pair whether greedy decoding from the prompt writes the answer; it is called once with
    all of them. Facts without a true target are left out, for nothing says that the model knows them.

    Raises:
        DatasetError: no request has a true target, or `says` returned another number of verdicts.
    """
    candidates = [(request, request.target_true) for request in requests if request.target_true is not None]
    if not candidates:
        raise DatasetError(
            f"none of the {len(requests)} facts has a true target, so it cannot be asked which of them the model knows; "
            "set dataset.known_only=false"
        )
    verdicts = says([request.full_prompt for request, _ in candidates], [answer for _, answer in candidates])
    if len(verdicts) != len(candidates):
        raise DatasetError(f"the model was asked about {len(candidates)} facts, and {len(verdicts)} verdicts came back; one for each")
    return tuple(request for (request, _), verdict in zip(candidates, verdicts, strict=True) if verdict)
