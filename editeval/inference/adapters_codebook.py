"""The codebook of GRACE as an adapter: a hook that replaces a site's output where a prompt ends near a known key.

Hartvigsen et al. 2023, "Aging with GRACE", arXiv:2211.11031, equation 1: with q the site's input at the prompt's last token and k_i the
nearest key, the output there becomes v_i if |q - k_i| <= epsilon_i and stays what it is else.

Shapes: N entries, Q queries (prompts of a batch), d_in and d_out the site's widths, L the labels' longest.
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

from editeval.edits.delta import AdapterDelta, CodebookDelta
from editeval.inference.adapters import PromptPath
from editeval.types import EditError

REPLACE = ("last", "prompt")
KEY_POSITIONS = ("prompt_end", "stale")
RADIUS_TOLERANCE = 1e-4  # relative; a key that an entry was stretched to lies on its sphere, where rounding decides without it
NO_LABEL = -1
QUERIES_AT_ONCE = 1024  # whose distances to all entries are held at once


@dataclass(frozen=True, kw_only=True, eq=False)
class CodebookEntry:
    """One row: key (d_in), value (d_out), both float32 on the CPU, radius, and the target's token ids."""

    key: Tensor
    value: Tensor
    epsilon: float
    label: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The entry nearest to a query, and its Euclidean distance."""

    entry: int
    distance: float


class CodebookAdapter:
    """The codebook at one site (an `ActivationAdapter`); keys, values, radii and labels are rows of one list, so they stay aligned.

    `replace` says at which tokens the output is replaced: at the prompt's last one, or at all of the prompt. `key_position` is where the
    query is taken: `prompt_end`; or `stale`, which reproduces a fault of published code: the position of the *last edited* prompt's end,
    whatever is asked, and every new token.
    """

    def __init__(self, *, site: str, d_in: int, d_out: int, replace: str = "last", key_position: str = "prompt_end") -> None:
        if replace not in REPLACE or key_position not in KEY_POSITIONS:
            raise ValueError(
                f"replace={replace!r} (one of {', '.join(REPLACE)}), key_position={key_position!r} (one of {', '.join(KEY_POSITIONS)})"
            )
        self.site = site
        self._widths = (d_in, d_out)
        self._replace = replace
        self._stale = key_position == "stale"
        self._entries: list[CodebookEntry] = []
        self._digests: list[bytes] = []
        self._last_position = 0
        self._stacked: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def entries(self) -> tuple[CodebookEntry, ...]:
        """Every row, in the order of insertion."""
        return tuple(self._entries)

    @property
    def is_empty(self) -> bool:
        """Whether there is no entry."""
        return not self._entries

    @property
    def every_step(self) -> bool:
        """Whether new tokens are looked at too: only in the published code's fault."""
        return self._stale

    @property
    def acts_in_texts(self) -> bool:
        """A text has no prompt that ends, so there is no query, and its scores say nothing of the codebook."""
        return False

    @property
    def sharing(self) -> Hashable:
        """The settings, and where the stale query stands."""
        return (self._replace, self._last_position) if self._stale else self._replace

    @property
    def observable(self) -> bool:
        """Whether queries stay what they are: the site's inputs at the prompts' ends are those of the unedited model."""
        return not self._stale

    def check(self, deltas: Sequence[AdapterDelta]) -> None:
        """Raise what `add` would raise, and change nothing."""
        self._updated(deltas)

    def add(self, deltas: Sequence[AdapterDelta]) -> None:
        """Replace and insert the entries of the deltas; see `Adapter.add`."""
        self._entries = self._updated(deltas)
        for delta in deltas:
            assert isinstance(delta, CodebookDelta)
            self._last_position = int(delta.position)
            for number in delta.entries.tolist():
                self._digests[number : number + 1] = [_digest(self._entries[number])]
        self._stacked.clear()

    def clear(self) -> None:
        """Remove every entry."""
        self._entries = []
        self._digests = []
        self._last_position = 0
        self._stacked.clear()

    def digest(self) -> str:
        """Return the sha256 over site, last edited position and every entry."""
        return hashlib.sha256(f"{self.site}\0{self._last_position}\0".encode() + b"".join(self._digests)).hexdigest()

    def snapshot(self) -> tuple[CodebookDelta, ...]:
        """Return one delta that inserts every entry."""
        rows = dict(enumerate(self._entries))
        return (codebook_delta(self.site, rows, position=self._last_position),) if rows else ()

    def nearest(self, query: Tensor) -> Nearest | None:
        """Return the entry nearest to a query (d_in), None of an empty codebook."""
        if not self._entries:
            return None
        distances = self._distances(query[None])[0]
        entry = int(distances.argmin())
        return Nearest(entry=entry, distance=float(distances[entry]))

    def query_position(self, *, prompt_tokens: int, tokens: int) -> int:
        """Return where the query is taken: at the prompt's last token; stale: where the last edited prompt ended, at most the end."""
        return min(self._last_position, tokens - 1) if self._stale else prompt_tokens - 1

    def shareable(self, first: int, second: int, shared: int) -> int:
        """Return how many equal first tokens may be shared by sequences whose queries are at `first` and `second`.

        No token at which one sequence may be changed, and no later one, may be shared with a sequence that is changed elsewhere.
        """
        if first == second and shared > first:
            return shared  # the same prompt: changed alike
        return 0 if self._replace == "prompt" else min(shared, first, second)

    @contextmanager
    def active(self, module: PreTrainedModel, prompts: Sequence[PromptPath]) -> Iterator[None]:
        """Within the context the site's output is replaced for prompts that end within an entry's radius."""
        handle = module.get_submodule(self.site).register_forward_hook(self._hook(prompts))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def observing(self, module: PreTrainedModel, prompts: Sequence[PromptPath], seen: list[Tensor]) -> Iterator[None]:
        """Within the context the queries of these prompts (P, d_in) are put into `seen`."""

        def hook(submodule: nn.Module, arguments: tuple[Any, ...]) -> None:  # noqa: ARG001
            seen.append(_queries(arguments[0], prompts).float().cpu())

        handle = module.get_submodule(self.site).register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def reaches(self, seen_PD: Tensor) -> bool:
        """Return whether any of these queries is within the radius of its nearest entry."""
        return not self.is_empty and any(bool(self._hits(queries_QD)[0].any()) for queries_QD in torch.split(seen_PD, QUERIES_AT_ONCE))

    def _hook(self, prompts: Sequence[PromptPath]) -> Any:
        def hook(submodule: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:  # noqa: ARG001
            hit_Q, entry_Q = self._hits(_queries(arguments[0], prompts))
            hits = hit_Q.nonzero()[:, 0].tolist()
            if not hits:
                return None  # bit for bit the model without a codebook
            values_ND = self._rows(output.device)[1]
            replaced = output.clone()
            for hit in hits:
                nodes = prompts[hit].nodes if self._replace == "prompt" else prompts[hit].nodes[-1:]
                replaced[prompts[hit].row, list(nodes)] = values_ND[entry_Q[hit]].to(output.dtype)
            return replaced

        return hook

    def _hits(self, queries_QD: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each query is within the radius of its nearest entry (Q), and which entry that is (Q)."""
        nearest = self._distances(queries_QD).min(dim=1)
        epsilons_N = self._rows(queries_QD.device)[2]
        return nearest.values <= epsilons_N[nearest.indices] * (1 + RADIUS_TOLERANCE), nearest.indices

    def _distances(self, queries_QD: Tensor) -> Tensor:
        """Return Euclidean distances (Q, N), float64; each depends on its own query and key alone."""
        keys_ND = self._rows(queries_QD.device)[0]
        return torch.cdist(queries_QD.double(), keys_ND, compute_mode="donot_use_mm_for_euclid_dist")

    def _rows(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys (N, d_in) and radii (N) in float64 and values (N, d_out) in float32 on a device."""
        if device not in self._stacked:
            keys = torch.stack([entry.key for entry in self._entries]).double()
            values = torch.stack([entry.value for entry in self._entries])
            epsilons = torch.tensor([entry.epsilon for entry in self._entries], dtype=torch.float64)
            self._stacked[device] = (keys.to(device), values.to(device), epsilons.to(device))
        return self._stacked[device]

    def _updated(self, deltas: Sequence[AdapterDelta]) -> list[CodebookEntry]:
        """Return the entries after the deltas, checked; nothing is changed."""
        entries = list(self._entries)
        for delta in deltas:
            if not isinstance(delta, CodebookDelta) or delta.site != self.site:
                raise EditError(f"a {type(delta).__name__} is not of the codebook at {self.site}; replay it with the method that made it")
            self._check_shapes(delta)
            for row, number in enumerate(delta.entries.tolist()):
                if not 0 <= number <= len(entries):
                    raise EditError(f"codebook entry {number} cannot follow {len(entries)} entries; an edit before it is missing")
                entries[number : number + 1] = [_entry(delta, row)]
        if len(entries) == len(self._entries) and all(_same(*pair) for pair in zip(entries, self._entries, strict=True)):
            raise EditError(f"the edit changes nothing in the codebook at {self.site}; an edit must change the model")
        return entries

    def _check_shapes(self, delta: CodebookDelta) -> None:
        count = len(delta.entries)
        wanted = {"keys": (count, self._widths[0]), "values": (count, self._widths[1]), "epsilons": (count,)}
        for name, shape in wanted.items():
            tensor: Tensor = getattr(delta, name)
            if tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
                raise EditError(f"codebook {name} of {self.site} are {tuple(tensor.shape)}, expected finite numbers of shape {shape}")
        if delta.labels.ndim != 2 or len(delta.labels) != count:
            raise EditError(f"codebook labels of {self.site} are {tuple(delta.labels.shape)}, expected ({count}, length)")


def _queries(inputs_BTD: Tensor, prompts: Sequence[PromptPath]) -> Tensor:
    """Return the site's inputs (Q, d_in) where each prompt ends."""
    rows = torch.tensor([prompt.row for prompt in prompts], device=inputs_BTD.device)
    ends = torch.tensor([prompt.nodes[-1] for prompt in prompts], device=inputs_BTD.device)
    return inputs_BTD[rows, ends]


def codebook_delta(site: str, entries: dict[int, CodebookEntry], *, position: int) -> CodebookDelta:
    """Return the delta that writes these entries (by number), and notes the edited prompt's last position."""
    numbers = sorted(entries)
    rows = [entries[number] for number in numbers]
    longest = max(len(row.label) for row in rows)
    return CodebookDelta(
        site=site,
        entries=torch.tensor(numbers, dtype=torch.int64),
        keys=torch.stack([row.key for row in rows]),
        values=torch.stack([row.value for row in rows]),
        epsilons=torch.tensor([row.epsilon for row in rows], dtype=torch.float32),
        labels=torch.tensor([[*row.label, *[NO_LABEL] * (longest - len(row.label))] for row in rows], dtype=torch.int64),
        position=torch.tensor(position, dtype=torch.int64),
    )


def _entry(delta: CodebookDelta, row: int) -> CodebookEntry:
    label = tuple(token for token in delta.labels[row].tolist() if token != NO_LABEL)
    return CodebookEntry(key=delta.keys[row], value=delta.values[row], epsilon=float(delta.epsilons[row]), label=label)


def _same(one: CodebookEntry, other: CodebookEntry) -> bool:
    alike = (one.epsilon, one.label) == (other.epsilon, other.label)
    return alike and torch.equal(one.key, other.key) and torch.equal(one.value, other.value)


def _digest(entry: CodebookEntry) -> bytes:
    digest = hashlib.sha256(f"{entry.epsilon!r}\0{entry.label}\0".encode())
    for tensor in (entry.key, entry.value):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
