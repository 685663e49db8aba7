"""The verbs of editeval on one page: what a method, a benchmark, a data set, a model source and a callback must do.

An implementation is a frozen keyword-only dataclass whose fields are its config schema; `conf/` names it by `_target_`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.adapters import Adapter
from editeval.inference.edited import EditedModel
from editeval.models.model import LanguageModel
from editeval.types import (
    ConfigError,
    EditRequest,
    Evaluation,
    Footprint,
    ModelDescription,
    Progress,
    Score,
    SilentProgress,
    Workload,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast


@runtime_checkable
class ModelSource(Protocol):
    """Where a model comes from. Knows its shape and identity before its weights are loaded."""

    def describe(self) -> ModelDescription:
        """Return the model's shape from its config; raises ConfigError when it cannot be edited or found."""
        ...

    def load(self) -> LanguageModel:
        """Return the model, in evaluation mode, without gradients."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer alone; no weights are read."""
        ...

    def fingerprint(self) -> str:
        """Return the content hash of the weights as loaded (cached, so that a finished run need not load them)."""
        ...


@runtime_checkable
class PlannableSource(ModelSource, Protocol):
    """A model source that can say what a run will need of it before anything is fetched or loaded; optional."""

    @property
    def name(self) -> str:
        """The model's name in `conf/model`."""
        ...

    @property
    def name_or_path(self) -> str:
        """Where its files come from, as on the Hugging Face hub."""
        ...

    @property
    def dtype(self) -> str:
        """The type of its weights as loaded, such as `float32`."""
        ...

    def config(self) -> PreTrainedConfig:
        """Return the architecture's config; raises ConfigError when there is none."""
        ...

    def missing_files(self) -> tuple[str, ...]:
        """Return what must be fetched before the model can be loaded, in words; asks nobody and reads no weights."""
        ...

    def known_fingerprint(self) -> str | None:
        """Return `fingerprint()` where the cache has it, reading and fetching nothing."""
        ...


@runtime_checkable
class Editor(Protocol):
    """A method bound to one model, with everything prepared."""

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Compute one edit for these facts and leave the model, and every random generator, as found.

        The result depends on the model's state (weights, adapters, `model.auxiliary`), the requests and the seed alone.

        Raises:
            EditError: with the request's id, when a request cannot be edited.
        """
        ...


@runtime_checkable
class EditMethod(Protocol):
    """An editing method: its published settings as fields, and how to get ready."""

    @property
    def max_batch_size(self) -> int | None:
        """How many facts one edit can write; None for any number."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Return everything that the edits depend on beside model and requests (JSON-able; files and corpora as content hashes)."""
        ...

    def check(self, model: ModelDescription) -> None:
        """Raise ConfigError when these settings cannot work on this model; no weights needed."""
        ...

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor. Idempotent; sees the unedited model; long work goes to the cache by content key."""
        ...


@runtime_checkable
class AdapterMethod(EditMethod, Protocol):
    """An editing method whose edits stand beside the weights."""

    def adapter(self, lm: LanguageModel, cache: Cache, progress: Progress) -> Adapter:
        """Return the empty adapter that takes this method's edits. Sees the unedited model; long work goes to the cache by content key."""
        ...


def attach(method: EditMethod, model: EditedModel, cache: Cache, progress: Progress) -> None:
    """Give `model` the adapter of a method that has one, once; needed before its edits are applied or replayed."""
    if isinstance(method, AdapterMethod) and model.adapter is None:
        with model.unedited():
            model.attach(method.adapter(model.lm, cache, progress))


@runtime_checkable
class Predictable(Protocol):
    """A method that can say what it will need (memory, disk, operations) before anything is loaded; optional."""

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint | None:
        """Return the prediction, from shapes alone; None where it follows a method that cannot say."""
        ...


@runtime_checkable
class UsesStatistics(Protocol):
    """A method that needs statistics of the unedited model, and can say which are not in the cache yet; optional."""

    def missing_statistics(self, model: ModelDescription, fingerprint: str | None, cache: Cache) -> tuple[str, ...]:
        """Return the module paths whose statistics must be computed first; all of them where the model's fingerprint is not known."""
        ...


@runtime_checkable
class SaysStreaming(Protocol):
    """A method that says whether it can write one edit after another; optional: one that does not say can."""

    @property
    def streaming(self) -> bool:
        """Whether a trajectory of several edits is what the method is; false where it must see all facts at once."""
        ...


def is_streaming(method: EditMethod) -> bool:
    """Return whether a method can write one edit after another."""
    return method.streaming if isinstance(method, SaysStreaming) else True


@dataclass(frozen=True, kw_only=True)
class FollowsMethod:
    """The start of a method that works on the edits of another one, `of`: what is asked before the first edit, that one answers."""

    name: str
    of: EditMethod

    def __post_init__(self) -> None:
        if not isinstance(self.of, EditMethod):
            raise ConfigError(f"method.of is {self.of!r}, no editing method; choose one, such as method@of=memit")

    @property
    def max_batch_size(self) -> int | None:
        """As the method that it follows."""
        return self.of.max_batch_size

    @property
    def streaming(self) -> bool:
        """As the method that it follows."""
        return is_streaming(self.of)

    def settings(self) -> Mapping[str, Any]:
        """Return which method it follows, and that one's settings."""
        return {"of": self.of.settings(), "class": type(self.of).__qualname__}

    def check(self, model: ModelDescription) -> None:
        """Check the method that it follows."""
        self.of.check(model)

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint | None:
        """Predict what the method that it follows needs, if that can say."""
        return self.of.footprint(model, workload) if isinstance(self.of, Predictable) else None

    def missing_statistics(self, model: ModelDescription, fingerprint: str | None, cache: Cache) -> tuple[str, ...]:
        """Return what the method that it follows must compute first."""
        return self.of.missing_statistics(model, fingerprint, cache) if isinstance(self.of, UsesStatistics) else ()

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Fetch what the method that it follows reads; see `Fetches`."""
        return self.of.fetch(folder) if isinstance(self.of, Fetches) else ()


@dataclass(frozen=True, kw_only=True)
class EvaluationContext:
    """What a benchmark may know of the trajectory: the facts written so far, and those still planned.

    `template` says what was made of the data set's prompts, {} standing for one (see `models.prompt_format`).
    """

    num_edits: int
    edited: tuple[EditRequest, ...]
    planned: tuple[EditRequest, ...]
    seed: int
    cache: Cache
    progress: Progress = field(default_factory=SilentProgress)
    template: str = "{}"


@runtime_checkable
class Benchmark(Protocol):
    """Asks a model questions; leaves the model and every random generator as found."""

    @property
    def depends_on_requests(self) -> bool:
        """Whether the result depends on which facts were (or will be) edited, beside the model's state."""
        ...

    def check(self) -> None:
        """Raise ConfigError or DatasetError when a file, split or task is missing; no weights needed."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Return everything that the numbers depend on beside the model: versions, data hashes, limits, shots."""
        ...

    def evaluate(self, model: EditedModel, context: EvaluationContext) -> Evaluation:
        """Measure."""
        ...


@runtime_checkable
class ChecksModel(Protocol):
    """A benchmark that can tell, once the model is loaded and before anything is measured, that it cannot be asked of it."""

    def check_model(self, model: EditedModel) -> None:
        """Raise ConfigError when this model cannot read the questions; makes no forward pass."""
        ...


@runtime_checkable
class AsksInChat(Protocol):
    """A benchmark that says whether its questions are put in the model's chat template; optional: else it does not.

    Prompts of facts need no such word: they are in their format before a benchmark sees them.
    """

    @property
    def asks_in_chat(self) -> bool:
        """Whether the numbers depend on the tokenizer's chat template, which the model's fingerprint leaves out."""
        ...


@runtime_checkable
class Fetches(Protocol):
    """Something of a run that may come over the network, and can be copied to where it is found without one."""

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy what this needs to where it looks for it inside `folder` (as `paths.data`); return every file, none if it needs none.

        Raises:
            ConfigError, DatasetError: it cannot be had.
        """
        ...


@runtime_checkable
class FetchesModels(Fetches, Protocol):
    """Something that names models by settings of its own, which must name the copies where there is no network."""

    def found_in(self, folder: Path) -> Mapping[str, str]:
        """Return the settings with which what `fetch(folder)` copied is found."""
        ...


@runtime_checkable
class EditDataset(Protocol):
    """Facts to edit."""

    @property
    def known_only(self) -> bool:
        """Whether to keep only the facts that the model completes correctly before editing."""
        ...

    def check(self) -> None:
        """Raise DatasetError or ConfigError when the data is not there; cheap."""
        ...

    def load(self) -> tuple[EditRequest, ...]:
        """Return every valid row, in file order; raises DatasetError with file, row and reason."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a callback sees of a run; frozen: it observes, it cannot steer."""

    run_dir: str
    edit_key: str
    model_name: str
    method_name: str
    dataset_name: str
    rungs: tuple[int, ...]
    num_edits: int
    state_digest: str
    config: Mapping[str, Any]
    stopped: str | None = None  # why the trajectory ended before its last rung


@dataclass(frozen=True, kw_only=True)
class EditEvent:
    """One edit as it happened: for progress bars, trackers and the edit log.

    `weight_norm_ratio` is the largest ||W|| / ||W unedited|| of an edited matrix, `canary_ratio` the perplexity of a few plain
    sentences over the unedited model's, measured at rungs; None where an edit was replayed.
    """

    step: int
    num_edits: int
    request_ids: tuple[str, ...]
    seconds: float
    digest: str
    weights_digest: str
    replayed: bool
    diagnostics: Mapping[str, float]
    weight_norm_ratio: float | None = None
    canary_ratio: float | None = None


class Callback:
    """Seven hooks, all optional. `on_edit_end` may return a reason to stop editing; nothing else steers."""

    def on_run_start(self, state: RunState) -> None:
        """Run resolved, model about to load."""

    def on_edit_start(self, state: RunState, requests: Sequence[EditRequest]) -> None:
        """An edit is about to be computed."""

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        """An edit is in the journal and in the model. Return a reason to stop the trajectory here, or None."""
        return None

    def on_evaluation_start(self, state: RunState, benchmark: str) -> None:
        """A benchmark is about to run."""

    def on_evaluation_end(self, state: RunState, benchmark: str, scores: Sequence[Score]) -> None:
        """A benchmark's scores are on disk (measured now, or found)."""

    def on_exception(self, state: RunState, error: BaseException) -> None:
        """The run is about to fail with this error."""

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Every rung is measured; `scores` are all of them."""
