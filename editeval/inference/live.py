"""Greedy decoding with our attention: contexts are read packed, what they share is kept once, and live rows stand in slots.

The keys and values of a common beginning (the few-shot prompt of a task) are stored once for all rows behind it; each live row has a slot
for the keys and values that are its own. A step attends to both and merges the two by their log-sum-exp (see `attention.py`). A row that
has ended gives its slot to the next context.

Legend: S live rows, H heads, K key-value heads, G = H / K, P tokens of the beginning, W columns in use of the slots, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from editeval.inference.adapters import PassAdapter, PromptPath, share_limit
from editeval.inference.attention import KeysAndValues, attend, attending, layer_of, merge_into, refuse_unknown
from editeval.inference.encoding import TokenPair
from editeval.inference.endings import Ending, Live
from editeval.inference.forward import input_device, read
from editeval.inference.packing import PackingRules, ShareLimit, common_prefix, pack, path_to
from editeval.inference.plan import ScoringPlan

MAX_LIVE = 48  # more rows a step make it no cheaper per row on a CPU, and cost memory
GPU_MAX_LIVE = 512  # on a GPU a step takes about as long with few rows
CACHE_BATCHES = 16  # live rows x (own tokens + new tokens) may be this many times `batch_tokens`
COLUMNS = 64  # slots grow by this many columns
MIN_BEGINNING = 32  # tokens; a shorter one costs more in calls than it saves


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows whose contexts begin with the same `shared` tokens."""

    shared: int
    rows: list[Live]


@dataclass(frozen=True, kw_only=True)
class Read:
    """A context that was read: its row with the first new token, and where its keys and values are."""

    row: Live
    kept: KeysAndValues
    nodes: tuple[int, ...]


def decode_live(
    module: PreTrainedModel,
    rows: Sequence[Live],
    ending: Ending,
    plan: ScoringPlan,
    adapter: PassAdapter | None,
    *,
    max_new_tokens: int,
) -> None:
    """Continue all rows to their ends: fills their `generated`."""
    most = GPU_MAX_LIVE if input_device(module).type == "cuda" else MAX_LIVE
    for group in groups_of(rows, _limit(adapter, rows)):
        longest = max(len(row.context) for row in group.rows) - group.shared + max_new_tokens
        size = max(1, min(most, CACHE_BATCHES * plan.batch_tokens // longest))
        _decode_group(module, group, size, ending, plan.rules, adapter)


def groups_of(rows: Sequence[Live], limit: ShareLimit | None) -> list[Group]:
    """Group rows by common beginnings; those without a long one share nothing. Depends on the contexts alone, not on their order."""
    order = sorted(range(len(rows)), key=lambda number: rows[number].context)
    ids = [numpy.asarray(row.context, dtype=numpy.uint32) for row in rows]
    groups: list[tuple[int, list[int]]] = []
    for number in order:
        size = len(rows[number].context)
        if groups:
            length, members = groups[-1]
            shared = common_prefix(ids[members[-1]], ids[number])
            shared = shared if limit is None else limit(members[-1], number, shared)
            # A neighbour that would cost a group most of its beginning belongs to the next group.
            if shared >= MIN_BEGINNING and (len(members) == 1 or 2 * shared >= length):
                groups[-1] = (min(length, shared), [*members, number])
                continue
        groups.append((size, [number]))
    found = [Group(shared=length, rows=[rows[number] for number in members]) for length, members in groups if len(members) > 1]
    alone = [rows[members[0]] for _, members in groups if len(members) == 1]
    return [*found, Group(shared=0, rows=alone)] if alone else found


def _decode_group(
    module: PreTrainedModel, group: Group, size: int, ending: Ending, rules: PackingRules, adapter: PassAdapter | None
) -> None:
    waiting = _reading(module, group.rows, rules, adapter)
    slots = Slots(size=size, shared=group.shared)
    live: list[Live] = []
    while True:
        arrived: list[Read] = []
        while len(live) < size and (context := next(waiting, None)) is not None:
            if ending.reached(context.row):
                continue
            if arrived and arrived[-1].kept is not context.kept:  # of another pass
                slots.fill(len(live) - len(arrived), arrived)
                arrived = []
            arrived.append(context)
            live.append(context.row)
        slots.fill(len(live) - len(arrived), arrived)
        if not live:
            return
        for row, token in zip(live, _step(module, slots, live, adapter), strict=True):
            row.generated.append(token)
        sources = list(range(len(live)))
        for place in reversed(range(len(live))):
            if ending.reached(live[place]):
                last, source = live.pop(), sources.pop()
                if place < len(live):  # the last one moves into the gap
                    live[place], sources[place] = last, source
        slots.move(sources)


def _reading(module: PreTrainedModel, rows: Sequence[Live], rules: PackingRules, adapter: PassAdapter | None) -> Iterator[Read]:
    """Yield the contexts as they are wanted, packed pass by packed pass."""
    # What follows the context is not known, and not read: any token will do.
    pairs = [TokenPair(context=row.context, continuation=(0,)) for row in rows]
    for packed in pack(pairs, rules, share_limit=_limit(adapter, rows)):
        paths = [path_to(packed, member.nodes[0]) for member in packed.members]
        acting: Any = nullcontext()
        if adapter is not None:
            prompts = []
            for member, nodes in zip(packed.members, paths, strict=True):
                query = adapter.query_position(prompt_tokens=len(nodes), tokens=len(nodes))
                prompts.append(PromptPath(row=0, nodes=nodes[: query + 1], choice=rows[member.pair].choice))
            acting = adapter.active(module, prompts)
        with acting:
            logits_NV, kept = read(module, packed)
        next_of = dict(zip(packed.scored, logits_NV.float().argmax(-1).tolist(), strict=True))
        for member, nodes in zip(packed.members, paths, strict=True):
            row = rows[member.pair]
            row.generated.append(next_of[member.nodes[0]])
            yield Read(row=row, kept=kept, nodes=nodes)


def _step(module: PreTrainedModel, slots: Slots, live: Sequence[Live], adapter: PassAdapter | None) -> list[int]:
    """Return the next token of each live row."""
    device = input_device(module)
    tokens_S = torch.tensor([row.generated[-1] for row in live], device=device)
    positions_S = torch.tensor([len(row.context) + len(row.generated) - 1 for row in live], device=device)
    acting: Any = nullcontext()
    if adapter is not None and adapter.every_step:
        acting = adapter.active(module, [PromptPath(row=place, nodes=(0,), choice=row.choice) for place, row in enumerate(live)])
    slots.advance(len(live))
    with attending(module, slots), acting:
        logits: Tensor = module(input_ids=tokens_S[:, None], position_ids=positions_S[:, None], use_cache=False).logits
    next_S: list[int] = logits[:, -1].float().argmax(-1).tolist()
    return next_S


class Slots:
    """Keys and values of the live rows: of their common beginning once, of what is their own a slot each. Is the attention of a step."""

    def __init__(self, *, size: int, shared: int) -> None:
        self._size = size
        self._shared = shared
        self._beginning: KeysAndValues = {}
        self._own: KeysAndValues = {}
        self._lengths: list[int] = [0] * size
        self._columns = 0
        self._width = 0
        self._mask: Tensor | None = None
        self._places: tuple[Tensor, Tensor] | None = None

    def fill(self, first: int, contexts: Sequence[Read]) -> None:
        """Put contexts that one pass has read into slots, from the slot `first` on: one copy a layer for all of them."""
        if not contexts:
            return
        kept = contexts[0].kept
        beginning = list(contexts[0].nodes[: self._shared])
        own = [context.nodes[self._shared :] for context in contexts]
        self._grow(max(1, *map(len, own)), kept)
        self._lengths[first : first + len(own)] = map(len, own)
        rows = torch.tensor([first + number for number, nodes in enumerate(own) for _ in nodes], dtype=torch.long)
        columns = torch.tensor([column for nodes in own for column in range(len(nodes))], dtype=torch.long)
        nodes_N = torch.tensor([node for nodes in own for node in nodes], dtype=torch.long)
        for layer, tensors in kept.items():
            if self._shared and layer not in self._beginning:
                self._beginning[layer] = _each(tensors, lambda tensor: tensor[:, :, beginning].contiguous())
            rows, columns, nodes_N = (index.to(tensors[0].device) for index in (rows, columns, nodes_N))
            for slot, tensor in zip(self._own[layer], tensors, strict=True):
                slot[rows, :, columns] = tensor[0][:, nodes_N].transpose(0, 1)

    def move(self, sources: Sequence[int]) -> None:
        """Let slot i hold what slot `sources[i]` holds."""
        moved = [(target, source) for target, source in enumerate(sources) if target != source]
        if not moved:
            return
        targets_M, sources_M = torch.tensor(moved).unbind(1)
        length = max(self._lengths[source] for _, source in moved)
        for tensors in self._own.values():
            targets_M, sources_M = targets_M.to(tensors[0].device), sources_M.to(tensors[0].device)
            for tensor in tensors:
                tensor[targets_M, :, :length] = tensor[sources_M, :, :length]
        self._lengths[: len(sources)] = [self._lengths[source] for source in sources]

    def advance(self, count: int) -> None:
        """Make room for one more token in each of the first `count` slots: the next pass writes it."""
        lengths = self._lengths[:count]
        self._width = max(lengths) + 1
        self._grow(self._width, self._own)
        key = next(iter(self._own.values()))[0]
        lengths_S = torch.tensor(lengths, device=key.device)
        hidden_SW = torch.arange(self._width, device=key.device)[None] > lengths_S[:, None]
        self._mask = torch.zeros(hidden_SW.shape, dtype=key.dtype, device=key.device).masked_fill_(hidden_SW, float("-inf"))[:, None, None]
        self._places = (torch.arange(count, device=key.device), lengths_S)
        self._lengths[:count] = [length + 1 for length in lengths]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Return the outputs (S, 1, H, D) for queries (S, H, 1, D), keys and values (S, K, 1, D) of the newest tokens."""
        refuse_unknown(mask, options)
        assert self._mask is not None
        assert self._places is not None
        layer = layer_of(module)
        count, heads, _, width = query.shape
        stored_keys, stored_values = self._own[layer]
        rows, columns = (index.to(key.device) for index in self._places)
        stored_keys[rows, :, columns] = key[:, :, 0]
        stored_values[rows, :, columns] = value[:, :, 0]
        # The heads that share keys are queries of one head: nothing is copied.
        grouped = query.reshape(count, key.shape[1], heads // key.shape[1], width)
        own_mask = self._mask.to(key.device).expand(count, key.shape[1], grouped.shape[2], self._width)
        own = stored_keys[:count, :, : self._width], stored_values[:count, :, : self._width]
        output, log_sum = attend(grouped, *own, mask=own_mask, causal=False, scale=scaling)
        if self._shared:
            output = output.to(torch.promote_types(output.dtype, torch.float32))
            merge_into(output, log_sum, self._attend_to_beginning(grouped, layer, scaling))
        return output.to(query.dtype).reshape(count, 1, heads, output.shape[-1]), None

    def _attend_to_beginning(self, query_SKGD: Tensor, layer: int, scaling: float | None) -> tuple[Tensor, Tensor]:
        count, kv_heads, groups, width = query_SKGD.shape
        together = query_SKGD.transpose(0, 1).reshape(1, kv_heads, count * groups, width)
        output, log_sum = attend(together, *self._beginning[layer], mask=None, causal=False, scale=scaling)
        apart = (kv_heads, count, groups)
        return output.reshape(*apart, output.shape[-1]).transpose(0, 1), log_sum.reshape(apart).transpose(0, 1)

    def _grow(self, columns: int, like: KeysAndValues) -> None:
        """Have at least this many columns in every slot."""
        if columns <= self._columns:
            return
        self._columns = -(-columns // COLUMNS) * COLUMNS
        for layer, tensors in like.items():
            wider = _each(tensors, lambda tensor: tensor.new_zeros((self._size, tensor.shape[1], self._columns, tensor.shape[3])))
            for new, old in zip(wider, self._own.get(layer, ()), strict=False):
                new[:, :, : old.shape[2]] = old
            self._own[layer] = wider


def _each(tensors: tuple[Tensor, Tensor], make: Any) -> tuple[Tensor, Tensor]:
    return make(tensors[0]), make(tensors[1])


def _limit(adapter: PassAdapter | None, rows: Sequence[Live]) -> ShareLimit | None:
    if adapter is None:
        return None
    sizes = [len(row.context) for row in rows]
    return share_limit(adapter, [adapter.query_position(prompt_tokens=size, tokens=size) for size in sizes])
