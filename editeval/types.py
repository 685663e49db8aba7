"""The nouns of editeval: what is asked of a model, what was measured, and how things are keyed.

Nothing here knows torch, Hydra or a model. Every record is frozen; every error says what was
wrong, what it got, what is allowed and what to do next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")


class EditevalError(Exception):
    """Base of every error that a person can do something about."""


class ConfigError(EditevalError):
    """The configuration cannot work; raised before any weights are loaded."""


class DatasetError(EditevalError):
    """A file or a row of a data set is wrong; the message names file, row and reason."""


class HubError(DatasetError):
    """The hub does not give what a run reads: it may from a machine that has network."""


class EditError(EditevalError):
    """An edit failed; `request_ids` are the facts it was about."""

    def __init__(self, message: str, *, request_ids: Sequence[str] = ()) -> None:
        self.request_ids = tuple(request_ids)
        suffix = f" [request {', '.join(self.request_ids)}]" if self.request_ids else ""
        super().__init__(message + suffix)


class JournalError(EditevalError):
    """The edit journal on disk is damaged or belongs to something else."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A question about something near the edit, with the answer that is expected of it."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to write into a model.

    `prompt` holds exactly one `{}` where the subject stands; targets carry no leading space (the
    tokenizer's own rules join them to the prompt). `target_true` may be None where a data set has no
    original answer. `neighborhood_prompts` are about other subjects, each with its own true answer.

    Raises:
        ValueError: a prompt without exactly one `{}`, or an empty id, subject or target.
    """

    request_id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    source_hash: str = ""

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt {self.prompt!r} holds {self.prompt.count('{}')} placeholders '{{}}'; exactly one")
        for name in ("request_id", "subject", "target_new"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty")
        if self.target_true is not None and not self.target_true.strip():
            raise ValueError("target_true is empty; leave it out where the data set has none")

    @property
    def full_prompt(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What is known of a model before its weights are loaded (from its config alone).

    `attention_width` is that of what attention's output map reads, heads times head width; some models have it unlike `hidden_size`.
    """

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    attention_width: int
    intermediate_size: int
    vocab_size: int
    max_positions: int

    def check_layers(self, layers: Iterable[int], *, setting: str) -> None:
        """Check layers that `setting` names.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise ConfigError(f"layer {layer} not in 0..{self.num_layers - 1} of {self.name}; set {setting}")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a footprint depends on beside method and model.

    Bytes of a stored weight, facts an edit, and whether an optimisation's steps are captured, as they are on one GPU.
    """

    element_bytes: int
    batch_size: int
    captured: bool = False


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a method needs beside the model's weights, predicted from shapes alone.

    `held_bytes` stay on the device from the first edit on; `peak_bytes` are phases, of which one runs at a time; both by what they are
    for. `disk_bytes` are needed in the shared cache, `journal_bytes` are written each edit; `auxiliary_bytes` of them are what later edits
    must remember. `once_operations` and `edit_operations` count floating-point operations of getting ready and of one edit. `edited` are
    the shapes (d_out, d_in) of the matrices that an edit changes, and `low_rank` whether its updates are products of few vectors, for
    methods that go over another's updates.
    """

    held_bytes: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    disk_bytes: int = 0
    journal_bytes: int = 0
    auxiliary_bytes: int = 0
    once_operations: float = 0.0
    edit_operations: float = 0.0
    edited: tuple[tuple[int, int], ...] = ()
    low_rank: bool = True


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number that a benchmark measured, before it is known on which state.

    `protocol` says how (`probability`, `teacher_forced`, `generation`, `likelihood`, ...); values of different
    protocols are never averaged. `chance` is the score of guessing where there is one; `shots` the number of examples in a prompt,
    and `template` a hash of how prompts are written and answers read, where a benchmark has them.
    """

    task: str
    metric: str
    protocol: str
    value: float
    n: int
    stderr: float | None = None
    chance: float | None = None
    higher_is_better: bool = True
    version: str = "1"
    shots: int | None = None
    template: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measurement with its provenance: which benchmark, on which state of which trajectory."""

    benchmark: str
    task: str
    metric: str
    protocol: str
    value: float
    n: int
    num_edits: int
    state_digest: str
    benchmark_key: str
    seconds: float
    stderr: float | None = None
    chance: float | None = None
    higher_is_better: bool = True
    version: str = "1"
    shots: int | None = None
    template: str | None = None

    @property
    def name(self) -> str:
        """`benchmark/task.metric.protocol`, the axis name in every figure and tracker."""
        return f"{self.benchmark}/{self.task}.{self.metric}.{self.protocol}"

    @property
    def chance_corrected(self) -> float | None:
        """`(value - chance) / (1 - chance)`: 0 for guessing, 1 for a perfect score; None where nothing is guessed."""
        if self.chance is None or self.chance >= 1 or not self.higher_is_better:
            return None
        return (self.value - self.chance) / (1 - self.chance)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a benchmark returns: its numbers, and one JSON-able record an item for paired statistics."""

    measurements: tuple[Measurement, ...]
    samples: tuple[Mapping[str, Any], ...] = ()


@runtime_checkable
class Progress(Protocol):
    """Live progress of long work; `SilentProgress` where nobody watches."""

    def track(self, items: Iterable[Item], *, description: str, total: int | None = None) -> Iterator[Item]:
        """Yield every item, showing how far the work is."""
        ...

    def message(self, text: str) -> None:
        """Say one line."""
        ...


@dataclass(frozen=True)
class SilentProgress:
    """Shows nothing."""

    def track(self, items: Iterable[Item], *, description: str, total: int | None = None) -> Iterator[Item]:
        yield from items

    def message(self, text: str) -> None:
        return None


def content_key(value: Any) -> str:
    """Return the sha256 (hex) of a value's canonical JSON: equal content, equal key, on every machine.

    Raises:
        TypeError: for a value that is neither JSON nor a dataclass.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_as_json, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """Return in JSON's types what JSON has no word for."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a content key; got {value!r}")


def counted(number: int, noun: str) -> str:
    """Return "1 edit", "2 edits"; nouns whose plural ends in s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seed_for(*parts: str | int) -> int:
    """Return a 63-bit seed that depends on all parts alone, so that no generator is ever shared."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
