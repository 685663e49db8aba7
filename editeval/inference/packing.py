"""Token sequences packed into rows, so that what they share is computed once.

A row holds trees of tokens: sequences that begin alike (the choices of one question, questions behind one few-shot prompt) share the
nodes of their common beginning, and short trees stand side by side instead of being padded. A node attends to its ancestors alone
and its position is its depth, so every sequence gets what it would get on its own. Rows and batches depend on the token ids alone,
never on the order of the requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

from editeval.inference.encoding import TokenPair

Ids = NDArray[numpy.uint32]

ShareLimit = Callable[[int, int, int], int]
"""Given two pairs (their numbers) and how many first tokens are the same, how many of these one node may stand for."""

MAX_OPEN_ROWS = 64  # how many rows are looked through for room


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Nodes `start` to `stop` of a row: a chain that hangs on the path `ancestors` (nodes from the root down)."""

    start: int
    stop: int
    ancestors: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One pair's place in a row: at `nodes[i]` its continuation's token i is predicted."""

    pair: int
    nodes: tuple[int, ...]


@dataclass(kw_only=True)
class Row:
    """Trees of tokens; grows while rows are packed."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    depths: array[int] = field(default_factory=lambda: array("i"))
    segments: list[Segment] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    scored_nodes: set[int] = field(default_factory=set)

    def add(self, member: Member) -> None:
        """Take in a pair whose nodes are there."""
        self.members.append(member)
        self.scored_nodes.update(member.nodes)

    @property
    def branches(self) -> bool:
        """Whether the row is more than one chain, so that plain causal attention is not enough."""
        return any(len(segment.ancestors) != segment.start for segment in self.segments)

    @property
    def scored(self) -> list[int]:
        """The nodes whose predictions are needed, ascending."""
        return sorted(self.scored_nodes)

    @property
    def nbytes(self) -> int:
        """About how much memory the row takes."""
        paths = sum(len(segment.ancestors) for segment in self.segments) + sum(len(member.nodes) for member in self.members)
        return 8 * len(self.tokens) + 8 * paths + 200 * (len(self.segments) + len(self.members))


@dataclass(frozen=True, kw_only=True)
class PackingRules:
    """When a sequence may join a row.

    `row_tokens` is the longest row that grows by sharing, `fill_tokens` the longest that is filled with strangers, `row_scored` the most
    scored nodes of a row that grows; `branch_depth` the deepest tree in a row that is not one chain (0: all rows are chains);
    `token_price` the number of query-key pairs of attention that cost as much as one token's matrix products (None: masked pairs cost
    nothing, so that sharing always pays).
    """

    row_tokens: int
    fill_tokens: int
    row_scored: int
    branch_depth: int
    token_price: int | None


def pack(pairs: Sequence[TokenPair], rules: PackingRules, *, share_limit: ShareLimit | None = None) -> list[Row]:
    """Pack all pairs into rows; every pair is a member of exactly one. Equal beginnings are shared, up to `share_limit` if given."""
    # Big-endian bytes sort as the ids do, so that sequences with a common beginning become neighbours.
    inputs = [numpy.asarray((*pair.context, *pair.continuation[:-1]), dtype=">u4") for pair in pairs]
    keys = [ids.tobytes() for ids in inputs]
    rows: list[Row] = []
    previous: Ids = numpy.empty(0, dtype=">u4")
    path: tuple[int, ...] = ()
    neighbour = 0
    # Pairs of the same tokens, split elsewhere, fill a row's scored nodes differently: they too have an order.
    for index in sorted(range(len(pairs)), key=lambda index: (keys[index], len(pairs[index].continuation))):
        ids = inputs[index]
        shared = common_prefix(previous, ids)
        if share_limit is not None:
            shared = share_limit(neighbour, index, shared)
        if not rows or not _joins(rows[-1], rules, shared=shared, length=len(ids), scored=len(pairs[index].continuation)):
            rows.append(Row())
            shared = 0
        path = _grow(rows[-1], path[:shared], ids[shared:].tolist())
        rows[-1].add(Member(pair=index, nodes=path[len(path) - len(pairs[index].continuation) :]))
        previous, neighbour = ids, index
    return _side_by_side(rows, rules)


def batches(rows: Sequence[Row], *, batch_tokens: int, batch_scored: int, trees_alone: bool = False) -> list[list[Row]]:
    """Group rows of like length, longest first: at most `batch_tokens` tokens (padding counted) and `batch_scored` scored nodes.

    A row that alone is over a budget is a batch of its own; with `trees_alone` so is every row that branches. Chains and trees never
    meet: chains need no mask.
    """
    grouped: list[list[Row]] = []
    width = scored = 0
    for row in sorted(rows, key=lambda row: (row.branches, -len(row.tokens), row.tokens)):
        needed = len(row.scored)
        fits = grouped and row.branches == grouped[-1][0].branches and not (trees_alone and row.branches)
        if fits and (len(grouped[-1]) + 1) * width <= batch_tokens and scored + needed <= batch_scored:
            grouped[-1].append(row)
            scored += needed
        else:
            grouped.append([row])
            width, scored = len(row.tokens), needed
    return grouped


def path_to(row: Row, node: int) -> tuple[int, ...]:
    """Return the nodes from the root down to `node`."""
    segment = next(segment for segment in row.segments if segment.start <= node < segment.stop)
    return (*segment.ancestors, *range(segment.start, node + 1))


def ancestor_mask(row: Row) -> NDArray[numpy.bool_]:
    """Return (query, key), true where the query node may see the key node: itself and its ancestors."""
    size = len(row.tokens)
    mask = numpy.zeros((size, size), dtype=bool)
    for segment in row.segments:
        own = slice(segment.start, segment.stop)
        mask[own, list(segment.ancestors)] = True
        mask[own, own] = numpy.tri(segment.stop - segment.start, dtype=bool)
    return mask


def _joins(row: Row, rules: PackingRules, *, shared: int, length: int, scored: int) -> bool:
    new = length - shared
    if new == 0:
        return True
    if len(row.tokens) + new > rules.row_tokens or len(row.scored_nodes) + scored > rules.row_scored:
        return False
    if shared == len(row.tokens):  # continues the chain: no branch, no other mask
        return True
    if max(length, max(row.depths) + 1) > rules.branch_depth:
        return False
    if rules.token_price is None:
        return shared > 0
    # Worth it while the shared tokens' matrix products cost more than the wider attention (new x old pairs, both ways, none skipped).
    return shared * rules.token_price > 2 * new * len(row.tokens)


def _grow(row: Row, ancestors: tuple[int, ...], tokens: list[int]) -> tuple[int, ...]:
    """Hang new tokens below a path and return the path to the last of them."""
    if not tokens:
        return ancestors
    start = len(row.tokens)
    row.tokens.extend(tokens)
    row.depths.extend(range(len(ancestors), len(ancestors) + len(tokens)))
    row.segments.append(Segment(start=start, stop=len(row.tokens), ancestors=ancestors))
    return (*ancestors, *range(start, len(row.tokens)))


def _side_by_side(rows: Sequence[Row], rules: PackingRules) -> list[Row]:
    """Fill rows up to `fill_tokens` with whole other rows, longest first, each into the first that has room."""
    filled: list[Row] = []
    open_rows: list[Row] = []
    for row in sorted(rows, key=lambda row: (-len(row.tokens), row.tokens)):
        fits = max(row.depths) < rules.branch_depth
        host = next((host for host in open_rows if fits and _has_room(host, row, rules)), None)
        if host is not None:
            _place_beside(host, row)
            continue
        filled.append(row)
        if fits:
            open_rows = [*open_rows[1 - MAX_OPEN_ROWS :], row]
    return filled


def _has_room(host: Row, guest: Row, rules: PackingRules) -> bool:
    return (
        len(host.tokens) + len(guest.tokens) <= rules.fill_tokens and len(host.scored_nodes) + len(guest.scored_nodes) <= rules.row_scored
    )


def _place_beside(host: Row, guest: Row) -> None:
    """Append the guest's trees to the host."""
    shift = len(host.tokens)
    host.tokens.extend(guest.tokens)
    host.depths.extend(guest.depths)
    for segment in guest.segments:
        ancestors = tuple(node + shift for node in segment.ancestors)
        host.segments.append(Segment(start=segment.start + shift, stop=segment.stop + shift, ancestors=ancestors))
    for member in guest.members:
        host.add(Member(pair=member.pair, nodes=tuple(node + shift for node in member.nodes)))


def common_prefix(left: Ids, right: Ids) -> int:
    """Return how many first tokens are the same."""
    size = min(len(left), len(right))
    different = numpy.flatnonzero(left[:size] != right[:size])
    return int(different[0]) if len(different) else size
