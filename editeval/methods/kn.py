"""KN: find the MLP neurons that express a fact, and write the new answer's embedding into their value vectors.

Dai et al. 2022, "Knowledge Neurons in Pretrained Transformers", arXiv:2104.08696.

    python launch.py method=kn num_edits=10
    python launch.py method=kn method.steps=1 method.points=ends method.refine=false       # the crude settings of later studies

Neurons whose integrated gradient (`keyvalue/attribution.py`) for the *old* answer is above `threshold` times the largest one are coarse
neurons of a prompt; those shared by more than `share` of a fact's prompts are its knowledge neurons. The value vector of each, a column of
the MLP's output matrix, changes by

    v' = v - subtract * t + add * t'

with t, t' the word embeddings of the old and the new answer (section 5.1), summed over their tokens. All neurons of a layer change
alike, so the update of a layer is of rank one.

A departure: the paper moves the share up or down by steps of 0.05 until 2 to 5 neurons are left on average over a relation's facts. A fact
that is edited here has no relation to average over, so the share stays as it is set, and is lowered only where no neuron is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from editeval.datasets.pararel import ParaRel, ParaRelCopy
from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.attribution import NEURONS, POINTS, ROWS_PER_PASS, integration_points, neuron_scores
from editeval.keyvalue.fine_tuning import SCORED_AT, TargetRow, scored_row
from editeval.keyvalue.footprint import APPLYING, MASTERS, PROMPT_TOKENS, TARGET_TOKENS, factor_bytes, mlp_maps, writing_of
from editeval.keyvalue.footprint_gradient import GradientPass
from editeval.keyvalue.last_position import LastPositionPass
from editeval.keyvalue.lookup import BARE, Located, locate
from editeval.keyvalue.suffix import next_token_logits
from editeval.models.model import LanguageModel
from editeval.types import ConfigError, EditError, EditRequest, Footprint, ModelDescription, Progress, Workload, content_key

EMBEDDINGS = ("output", "input")
LAYERS_WITH_NEURONS = 0.75  # of all: on the models of the tests the neurons of a fact lie in half of them or in every one
PARAPHRASES = 2  # of a fact, in CounterFact; ParaRel may add some
HUB = "hub"
NO_SETTINGS = ("name", "pararel_data", "pararel_hub")  # where patterns come from is no matter: their content is in the settings
SHARE_STEP = 0.05  # the paper moves its share by this much at a time


@dataclass(frozen=True, kw_only=True)
class KN:
    """KN's settings; published numbers are in conf/method/kn.yaml and conf/tuned/kn.

    `neurons` is one of `NEURONS`, `points` of `POINTS`, `scored_at` of `SCORED_AT`. `pararel` says which of ParaRel's patterns are used
    beside the data set's paraphrases: none, those of a file, or with `hub` those of the folder `pararel_data` or, where that is None, of
    the copy that `pararel_hub` names (`id`, `revision`). With `leading_blank` answers follow the prompt as text does, behind a blank;
    without it the tokens of the bare word stand there. `embedding` is the one that predicts (`output`) or that reads (`input`); tied
    models have one.
    `follow_sign` turns the update of neurons whose activation is negative, which would act the other way round.
    """

    max_batch_size: ClassVar[int | None] = 1

    name: str
    steps: int
    points: str
    neurons: str
    scored_at: str
    threshold: float
    refine: bool
    share: float
    pararel: str | None
    leading_blank: bool
    subtract: float
    add: float
    embedding: str
    follow_sign: bool
    pararel_data: str | None = None
    pararel_hub: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("points", POINTS), ("neurons", NEURONS), ("scored_at", SCORED_AT), ("embedding", EMBEDDINGS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"method.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} integrates nothing; set method.steps to at least 1")
        for name in ("threshold", "share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1; set method.{name}")
        if self.subtract < 0 or self.add < 0 or not self.subtract + self.add > 0:
            raise ConfigError(f"subtract={self.subtract} and add={self.add} must not be negative, nor both 0; set method.add")
        if self.pararel == HUB:
            _ = self._copy  # checks which one

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        patterns = content_key(self._patterns.prompts) if self.pararel is not None else None
        return {**{each.name: getattr(self, each.name) for each in fields(self) if each.name not in NO_SETTINGS}, "pararel": patterns}

    def check(self, model: ModelDescription) -> None:
        """Check that ParaRel's patterns can be read; every model of a known architecture has neurons.

        Raises:
            DatasetError: they cannot.
        """
        _ = self._patterns

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy ParaRel's patterns, where they come from the hub, to where `pararel_data=folder` finds them; return the file.

        Raises:
            DatasetError: the hub does not give them.
        """
        return self._copy.fetch(folder) if self.pararel == HUB else ()

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes; how many layers have neurons of a fact is an assumption."""
        maps = mlp_maps(model, model.num_layers)
        writing = writing_of(maps, workload)
        asked = (1 + PARAPHRASES * self.refine) * (1 if self.scored_at == "prompt_end" else TARGET_TOKENS)
        copies = min(self.steps, max(1, ROWS_PER_PASS // asked)) * asked
        together = GradientPass(first=0, rows=copies, tokens=1, scored=1)
        # In each layer the keys and values of what stands before the last position are repeated for every copy of a row, and joined to it.
        joined = copies * model.num_layers * PROMPT_TOKENS * 4 * model.hidden_size * workload.element_bytes
        steps = [GradientPass(first=layer, rows=self.steps * asked, tokens=1, scored=1) for layer in range(model.num_layers)]
        return Footprint(
            held_bytes={MASTERS: writing.masters},
            peak_bytes={"integrating gradients": together.kept_bytes(model, workload) + joined, APPLYING: writing.applying},
            host_bytes=writing.copies,
            journal_bytes=round(LAYERS_WITH_NEURONS * factor_bytes(maps, rank=1)),
            edit_operations=sum(step.operations(model) for step in steps),
            edited=tuple(edited.shape for edited in maps),
        )

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor; nothing has to be made."""
        return Editor(lm=model.lm, method=self, pararel=self._patterns)

    @cached_property
    def _patterns(self) -> ParaRel:
        if self.pararel == HUB:
            return self._copy.load()
        return ParaRel(prompts={}) if self.pararel is None else ParaRel.load(Path(self.pararel).expanduser())

    @property
    def _copy(self) -> ParaRelCopy:
        return ParaRelCopy(data=self.pararel_data, hub=self.pararel_hub)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """KN bound to a model."""

    lm: LanguageModel
    method: KN
    pararel: ParaRel

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the update of the value vectors of one fact's neurons.

        Raises:
            EditError: more or fewer than one request, or one that cannot be encoded.
        """
        ids = [request.request_id for request in requests]
        if len(requests) != 1:
            raise EditError(f"KN writes one fact an edit, got {len(requests)}; set batch_size=1, or choose method=memit", request_ids=ids)
        request = requests[0]
        rows = self.rows(request)
        alphas = integration_points(self.method.steps, self.method.points)
        scores_RLN = neuron_scores(self.lm, rows, neurons=self.method.neurons, alphas_M=alphas)
        chosen = knowledge_neurons(scores_RLN, threshold=self.method.threshold, share=self.method.share, request_id=request.request_id)
        deltas = self._updates(request, rows[0], chosen.mask)
        diagnostics = {
            "neurons": float(chosen.mask.sum()),
            "layers": float(len(deltas)),
            "prompts": float(len(rows)),
            "share": chosen.share,
            "score_max": float(scores_RLN[0].max()),
        }
        return Edit(deltas=deltas, diagnostics=diagnostics)

    def rows(self, request: EditRequest) -> tuple[TargetRow, ...]:
        """Return the fact's own prompt, and with `refine` its paraphrases, each with the old answer.

        A fact without an old answer (`target_true`) has what the model says now: the likeliest token at the end of its own prompt.

        Raises:
            EditError: a prompt that cannot be encoded.
        """
        prompts = [(request.prompt, request.subject)]
        if self.method.refine:
            prompts += [(BARE, paraphrase) for paraphrase in request.paraphrase_prompts]
            prompts += [(template, request.subject) for template in self.pararel.paraphrases(request.prompt)]
        located = [self._locate(template, subject, request.target_true, request.request_id) for template, subject in prompts]
        if request.target_true is not None:
            return tuple(scored_row(row, scored_at=self.method.scored_at, request_id=request.request_id) for row in located)
        said = self._said(located[0].token_ids)
        return tuple(
            TargetRow(request_id=request.request_id, input_ids=row.token_ids, positions=(len(row.token_ids) - 1,), tokens=(said,))
            for row in located
        )

    def _locate(self, template: str, subject: str, target: str | None, request_id: str) -> Located:
        tokenizer, limit = self.lm.tokenizer, self.lm.description.max_positions
        if target is None or self.method.leading_blank:
            return locate(tokenizer, template, subject, target=target, max_tokens=limit, request_id=request_id)
        bare = tokenizer(target.strip(), add_special_tokens=False)["input_ids"]
        prompt = locate(tokenizer, template, subject, max_tokens=limit - len(bare), request_id=request_id)
        return replace(prompt, token_ids=(*prompt.token_ids, *bare))

    def _said(self, token_ids: Sequence[int]) -> int:
        """Return the likeliest token after these."""
        top = self.lm.sites.layers.format(self.lm.description.num_layers - 1)
        passed = LastPositionPass(self.lm, [token_ids], sites=[top])
        with torch.no_grad():
            return int(next_token_logits(self.lm, passed.outputs[top])[0].argmax())

    def _updates(self, request: EditRequest, old: TargetRow, neurons_LN: Tensor) -> tuple[LowRankDelta, ...]:
        new = self._locate(request.prompt, request.subject, request.target_new, request.request_id)
        sites = self.lm.sites
        path = sites.head if self.method.embedding == "output" else sites.embedding
        embedding_VD = self.lm.module.get_submodule(path).get_parameter("weight").detach()
        change_D = self.method.add * _summed(embedding_VD, new.target_ids) - self.method.subtract * _summed(embedding_VD, old.tokens)
        signs_LN = self._signs(new) if self.method.follow_sign else torch.ones(neurons_LN.shape)
        return tuple(
            LowRankDelta(
                parameter=f"{sites.mlp_out.format(layer)}.weight", left=change_D[:, None], right=(neurons_N * signs_LN[layer])[None].float()
            )
            for layer, neurons_N in enumerate(neurons_LN)
            if bool(neurons_N.any())
        )

    def _signs(self, located: Located) -> Tensor:
        """Return the signs (layers, neurons) of the activations where the answer begins."""
        sites = [self.lm.sites.mlp_out.format(layer) for layer in range(self.lm.description.num_layers)]
        passed = LastPositionPass(self.lm, [located.token_ids[: located.target_start]], sites=sites)
        return torch.stack([passed.inputs[site][0].float().sign().cpu() for site in sites])


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The neurons of a fact as a mask (layers, neurons), and the share of its prompts that they were asked to be shared by."""

    mask: Tensor
    share: float


def knowledge_neurons(scores_RLN: Tensor, *, threshold: float, share: float, request_id: str = "") -> Chosen:
    """Choose neurons from the scores of R prompts (section 3.3); where none is shared enough, the share is lowered step by step.

    A departure from the paper, which also raises the share, until a relation's facts have 2 to 5 neurons on average (see the top).

    Raises:
        EditError: no neuron of a prompt adds to the answer's probability.
    """
    largest_R = scores_RLN.flatten(1).max(dim=1).values
    if not bool((largest_R > 0).all()):
        raise EditError(
            "no neuron adds to the probability of the old answer (every integrated gradient is 0, below 0 or not a number); "
            "the model may be broken by earlier edits, or set method.points=right",
            request_ids=[request_id],
        )
    counts_LN = (scores_RLN > threshold * largest_R[:, None, None]).sum(dim=0)
    while share > 0 and not bool((counts_LN > share * len(scores_RLN)).any()):
        share = max(0.0, share - SHARE_STEP)
    return Chosen(mask=counts_LN > share * len(scores_RLN), share=share)


def _summed(embedding_VD: Tensor, token_ids: Sequence[int]) -> Tensor:
    return embedding_VD[list(token_ids)].to("cpu", torch.float32).sum(dim=0)
