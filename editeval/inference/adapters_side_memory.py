"""The side memories of WISE as an adapter: a prompt is answered with the copy of one matrix that it moves most, if it moves it enough.

Wang et al. 2024, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", arXiv:2405.14768.

With a_t the inputs of the site at a prompt's T tokens and D_m = W'_m - W what memory m changes, the activation of m is

    activation_m = 1/T sum_t |D_m a_t|

and the prompt is in the scope of the memories whose activation exceeds `threshold` times the smallest of their edits'. Among these the one
with the largest activation acts, on every token of the prompt and of its answer; else the model is what it was, bit for bit.

A text that is scored as a whole is, window by window, a prompt without an answer.

A memory takes `shard_edits` edits, all within one random mask; `merge_shards` full ones become one memory by `ties`.

Shapes: M memories, T tokens, d_in and d_out the site's widths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from editeval.edits.delta import AdapterDelta, SideMemoryDelta
from editeval.inference.adapters import PromptPath
from editeval.types import EditError, seed_for

ALL = -1
"""The number that stands for no mask: every element may differ."""
NO_MEMORY = -1


@dataclass(frozen=True, kw_only=True)
class SideMemoryRules:
    """How prompts are routed and memories made: `mask_share` of a matrix's elements are in a mask, `density` of one stay in a merge."""

    threshold: float
    mask_share: float
    mask_seed: int
    shard_edits: int
    merge_shards: int
    density: float


@dataclass(frozen=True, kw_only=True, eq=False)
class SideMemory:
    """One memory: its difference (d_out, d_in), float32 on the CPU, its mask's number, its edits' smallest activation, their number."""

    difference: Tensor
    mask: int
    activation: float
    edits: int


class SideMemoryAdapter:
    """The side memories at one site (an `ActivationAdapter`)."""

    def __init__(self, *, site: str, d_in: int, d_out: int, rules: SideMemoryRules) -> None:
        self.site = site
        self.rules = rules
        self._shape = (d_out, d_in)
        self._memories: list[SideMemory] = []
        self._mask: tuple[int, Tensor] | None = None
        self._on_device: dict[torch.device, Tensor] = {}

    @property
    def memories(self) -> tuple[SideMemory, ...]:
        """Every memory, in the order of their making."""
        return tuple(self._memories)

    @property
    def is_empty(self) -> bool:
        """Whether there is no memory."""
        return not self._memories

    @property
    def every_step(self) -> bool:
        """New tokens of an answer go where its prompt went."""
        return True

    @property
    def acts_in_texts(self) -> bool:
        """All tokens of a window decide, as those of a prompt do."""
        return True

    @property
    def sharing(self) -> Hashable:
        """Nothing: prompts share tokens where they are the same, whatever was edited."""
        return None

    def current(self) -> tuple[int, SideMemory]:
        """Return the memory that takes the next edit, and its number: the last one, or an empty one where that is full."""
        if self._memories and self._memories[-1].edits < self.rules.shard_edits and self._memories[-1].mask != ALL:
            return len(self._memories) - 1, self._memories[-1]
        written = sum(memory.edits for memory in self._memories)
        mask = written // self.rules.shard_edits
        return len(self._memories), SideMemory(difference=torch.zeros(self._shape), mask=mask, activation=float("inf"), edits=0)

    def mask(self, number: int) -> Tensor:
        """Return the random mask (d_out, d_in), bool, of this number; the same for the same rules, whatever was edited."""
        if number == ALL:
            return torch.ones(self._shape, dtype=torch.bool)
        if self._mask is None or self._mask[0] != number:
            generator = torch.Generator().manual_seed(seed_for("side-memory", self.rules.mask_seed, number))
            self._mask = (number, torch.rand(self._shape, generator=generator) < self.rules.mask_share)
        return self._mask[1]

    def delta(self, number: int, memory: SideMemory) -> SideMemoryDelta:
        """Return the delta that brings memory `number` to this state."""
        return SideMemoryDelta(
            site=self.site,
            memory=torch.tensor(number, dtype=torch.int64),
            mask=torch.tensor(memory.mask, dtype=torch.int64),
            values=memory.difference[self.mask(memory.mask)].contiguous(),
            activation=torch.tensor(memory.activation, dtype=torch.float32),
            edits=torch.tensor(memory.edits, dtype=torch.int64),
        )

    def check(self, deltas: Sequence[AdapterDelta]) -> None:
        """Raise what `add` would raise, and change nothing."""
        self._updated(deltas)

    def add(self, deltas: Sequence[AdapterDelta]) -> None:
        """Replace or add the memories of the deltas, and merge where enough of them are full; see `Adapter.add`."""
        self._memories = self._updated(deltas)
        self._on_device.clear()

    def clear(self) -> None:
        """Remove every memory."""
        self._memories = []
        self._on_device.clear()

    def digest(self) -> str:
        """Return the sha256 over the site and every memory."""
        digest = hashlib.sha256(f"{self.site}\0".encode())
        for memory in self._memories:
            digest.update(f"{memory.mask}\0{memory.activation!r}\0{memory.edits}\0".encode())
            digest.update(memory.difference.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def snapshot(self) -> tuple[SideMemoryDelta, ...]:
        """Return one delta a memory."""
        return tuple(self.delta(number, memory) for number, memory in enumerate(self._memories))

    def query_position(self, *, prompt_tokens: int, tokens: int) -> int:
        """Return the prompt's last token: all of the prompt decides."""
        return prompt_tokens - 1

    def shareable(self, first: int, second: int, shared: int) -> int:
        """Return how many equal first tokens two sequences may share: all of them where they have the same prompt, else none."""
        return shared if first == second and shared > first else 0

    def activations(self, inputs_TD: Tensor) -> Tensor:
        """Return the activation of each memory (M), float32, for a prompt whose tokens bring these inputs to the site."""
        changes_MTO = torch.einsum("td,mod->mto", inputs_TD.float(), self._differences(inputs_TD.device))
        norms_MT: Tensor = changes_MTO.norm(dim=2)
        return norms_MT.mean(dim=1)

    def choose(self, inputs_TD: Tensor) -> int:
        """Return the number of the memory that answers the prompt with these inputs, or `NO_MEMORY`."""
        limits_M = torch.tensor([self.rules.threshold * memory.activation for memory in self._memories], device=inputs_TD.device)
        activations_M = self.activations(inputs_TD)
        in_scope_M = activations_M > limits_M
        if not bool(in_scope_M.any()):
            return NO_MEMORY
        return int(torch.where(in_scope_M, activations_M, -torch.inf).argmax())

    @contextmanager
    def active(self, module: PreTrainedModel, prompts: Sequence[PromptPath]) -> Iterator[None]:
        """Within the context the site acts with the memory that each prompt chooses, or has chosen in an earlier pass."""
        handle = module.get_submodule(self.site).register_forward_hook(self._hook(prompts))
        try:
            yield
        finally:
            handle.remove()

    def _hook(self, prompts: Sequence[PromptPath]) -> Any:
        def hook(submodule: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:  # noqa: ARG001
            inputs: Tensor = arguments[0]
            changed: Tensor | None = None
            for prompt in prompts:
                if prompt.choice.made is None:
                    prompt.choice.made = self.choose(inputs[prompt.row, list(prompt.nodes)])
                if prompt.choice.made == NO_MEMORY:
                    continue
                nodes = [*prompt.nodes, *prompt.answer]
                change = inputs[prompt.row, nodes].float() @ self._differences(inputs.device)[prompt.choice.made].T
                changed = output.clone() if changed is None else changed
                changed[prompt.row, nodes] = (output[prompt.row, nodes].float() + change).to(output.dtype)
            return changed  # none: bit for bit the model without memories

        return hook

    def _differences(self, device: torch.device) -> Tensor:
        """Return all differences (M, d_out, d_in) on a device."""
        if device not in self._on_device:
            self._on_device[device] = torch.stack([memory.difference for memory in self._memories]).to(device)
        return self._on_device[device]

    def _updated(self, deltas: Sequence[AdapterDelta]) -> list[SideMemory]:
        """Return the memories after the deltas, checked; nothing is changed."""
        memories = list(self._memories)
        changed = False
        for delta in deltas:
            if not isinstance(delta, SideMemoryDelta) or delta.site != self.site:
                raise EditError(f"a {type(delta).__name__} is of no side memory at {self.site}; replay it with the method that made it")
            number = int(delta.memory)
            if not 0 <= number <= len(memories):
                raise EditError(f"side memory {number} cannot follow {len(memories)} memories; an edit before it is missing")
            memory = self._read(delta)
            old = memories[number].difference if number < len(memories) else torch.zeros(self._shape)
            changed = changed or not torch.equal(memory.difference, old)
            memories[number : number + 1] = [memory]
            memories = merged(memories, self.rules)
        if not changed:
            raise EditError(f"the edit changes nothing in the side memory at {self.site}; an edit must change the model")
        return memories

    def _read(self, delta: SideMemoryDelta) -> SideMemory:
        mask = self.mask(int(delta.mask))
        count = int(mask.sum())
        if tuple(delta.values.shape) != (count,) or not bool(torch.isfinite(delta.values).all()):
            raise EditError(f"side memory values of {self.site} are {tuple(delta.values.shape)}, expected {count} finite numbers")
        difference = torch.zeros(self._shape)
        difference[mask] = delta.values
        return SideMemory(difference=difference, mask=int(delta.mask), activation=float(delta.activation), edits=int(delta.edits))


def merged(memories: Sequence[SideMemory], rules: SideMemoryRules) -> list[SideMemory]:
    """Return the memories with the last `merge_shards` as one, where all of these are full and none came out of a merge."""
    group = memories[-rules.merge_shards :]
    if len(group) < rules.merge_shards or rules.merge_shards == 1:
        return list(memories)
    if any(memory.mask == ALL or memory.edits < rules.shard_edits for memory in group):
        return list(memories)
    one = SideMemory(
        difference=ties([memory.difference for memory in group], density=rules.density),
        mask=ALL,
        activation=min(memory.activation for memory in group),
        edits=sum(memory.edits for memory in group),
    )
    return [*memories[: -rules.merge_shards], one]


def ties(differences: Sequence[Tensor], *, density: float) -> Tensor:
    """Merge differences of one shape (Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708, algorithm 1).

    Of each, the `density` largest elements stay; of each element the sign with the larger sum wins; those that agree with it are averaged.
    """
    trimmed = torch.stack([_largest(difference, density) for difference in differences])
    sign = trimmed.sum(dim=0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    return torch.where(agree, trimmed, 0.0).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _largest(difference: Tensor, density: float) -> Tensor:
    dropped = difference.numel() - round(density * difference.numel())
    if dropped == 0:
        return difference
    limit = difference.abs().flatten().kthvalue(dropped).values
    return torch.where(difference.abs() > limit, difference, 0.0)
