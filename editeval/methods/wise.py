"""WISE: leave the weights alone; write into copies of one value matrix, and send to a copy only the prompts that move it much.

Wang et al. 2024, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", arXiv:2405.14768.

    python launch.py method=wise num_edits=10

A side memory is a copy W' of the MLP's output matrix W at one layer. With a_t what that matrix gets at the tokens of a prompt x, the
activation of the memory is act(x) = 1/T sum_t |(W' - W) a_t|. An edit (x_e, y_e), with unrelated prompts x_i, minimises

    -log P_W'(y_e | x_e) + max(0, act(x_i) - alpha) + max(0, beta - act(x_e)) + max(0, gamma - (act(x_e) - act(x_i)))

(equations 4 and 5) by gradient descent on the elements of W' that a random mask of share `mask_share` holds. x_e stands alone and behind
context prefixes; each x_e counts in the means of the loss. The threshold of the memory follows the smallest activation of any x_e.

How prompts find their memory, and how full memories are merged, is in `editeval.inference.adapters_side_memory`. It differs from the
published code in what would make an answer depend on its neighbours: every prompt is routed by its own tokens, and its answer goes with it.
A text that is scored as a whole (perplexity, wikitext) has no answer: each window of it is a prompt, routed by all of its tokens, as that
code routes whatever it is given.
Where that code departs from the paper, this follows the paper: an activation is |(W' - W) a|, there |f(W' a) - f(W a)| with the MLP's
nonlinearity f (for a random difference about half as large, so that the published margins are stricter there); a prompt of more than 100
tokens is judged by the mean of its tokens, there by the largest of them; a full memory acts where its own threshold is passed, there where
it also moves the prompt more than the unfinished one. The threshold is of each prompt behind a prefix; there, of their means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from editeval.datasets.training import TrainingSet
from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.adapters_side_memory import SideMemory, SideMemoryAdapter, SideMemoryRules
from editeval.inference.edited import EditedModel
from editeval.inference.encoding import TokenPair, answer_after, encode_answers
from editeval.interfaces import attach
from editeval.keyvalue.fine_tuning import TargetRow, TuningBatch
from editeval.keyvalue.footprint import FLOAT32, PROMPT_TOKENS, mlp_maps, prefixed_rows
from editeval.keyvalue.footprint_gradient import GradientPass
from editeval.keyvalue.prefixes import check_lengths, check_prefixes, context_prefixes
from editeval.keyvalue.settings import chosen_layer
from editeval.keyvalue.suffix import pad_rows
from editeval.models.model import LanguageModel
from editeval.models.sites import sites_for
from editeval.models.trace import capture, run_until
from editeval.types import ConfigError, EditError, EditevalError, EditRequest, Footprint, ModelDescription, Progress, Workload

PUBLISHED_DEPTH = 27 / 32  # layer 27 of Llama-2-7B's 32
STEP_COPIES = 6  # float32 copies of the matrix in a step: the difference, its gradient twice, masked, moved, clamped
ANSWERS_VERSION = 2  # raised when the same memories answer otherwise than before; since 2 they act in whole texts
STEADY = 1e-4  # change of the loss from one step to the next below which it may end, as in the published code


@dataclass(frozen=True, kw_only=True)
class WISE:
    """WISE's settings; published numbers are in conf/method/wise.yaml and conf/tuned/wise.

    `layer` None means the published relative depth. `alpha`, `beta` and `gamma` are activations, in the unit of one model's hidden states;
    `max_change` bounds each element of W' - W. `irrelevant` holds facts about other subjects: `irrelevant_prompts` of their prompts, drawn
    anew for each edit, should leave the memory quiet.
    """

    max_batch_size: ClassVar[int | None] = 1

    name: str
    layer: int | None
    num_steps: int
    learning_rate: float
    max_change: float
    stop_loss: float
    alpha: float
    beta: float
    gamma: float
    threshold: float
    mask_share: float
    mask_seed: int
    shard_edits: int
    merge_shards: int
    density: float
    irrelevant: TrainingSet
    irrelevant_prompts: int
    context_prefixes: Sequence[str] | None
    prefix_lengths: Sequence[Sequence[int]]
    prefix_seed: int

    def __post_init__(self) -> None:
        for name in ("num_steps", "shard_edits", "merge_shards", "irrelevant_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1; set method.{name}")
        for name in ("learning_rate", "max_change", "beta"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0; set method.{name}")
        for name in ("mask_share", "density", "threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0 and at most 1; set method.{name}")
        if self.context_prefixes is not None:
            check_prefixes(self.context_prefixes)
        check_lengths(self.prefix_lengths)

    @property
    def rules(self) -> SideMemoryRules:
        """How prompts are routed and memories made."""
        return SideMemoryRules(**{name: getattr(self, name) for name in SideMemoryRules.__dataclass_fields__})

    def settings(self) -> Mapping[str, Any]:
        """Return everything that edits and answers depend on beside model and requests."""
        left_out = ("name", "irrelevant", "context_prefixes", "prefix_lengths", "prefix_seed")
        fields = {name: getattr(self, name) for name in type(self).__dataclass_fields__ if name not in left_out}
        generated = {"lengths": [list(pair) for pair in self.prefix_lengths], "seed": self.prefix_seed}
        prefixes = generated if self.context_prefixes is None else list(self.context_prefixes)
        return {**fields, "irrelevant": self.irrelevant.content_hash(), "prefixes": prefixes, "answers": ANSWERS_VERSION}

    def check(self, model: ModelDescription) -> None:
        """Check the layer against the model's shape, and the rows.

        Raises:
            ConfigError: a layer that the model does not have.
            DatasetError: the irrelevant rows cannot be read.
        """
        self._layer(model)
        self.irrelevant.check()

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes: an edit records every element within the mask, whatever it changed."""
        (matrix,) = mlp_maps(model, 1)
        rows, tokens = prefixed_rows(self.context_prefixes, self.prefix_lengths)
        trained = GradientPass(first=self._layer(model), rows=rows, tokens=tokens)
        positions = trained.positions + self.irrelevant_prompts * PROMPT_TOKENS
        step = matrix.elements * STEP_COPIES + positions * (matrix.d_in + 4 * matrix.d_out)
        margins = 6.0 * matrix.elements * (trained.positions + positions)
        memory = matrix.elements * FLOAT32
        return Footprint(
            held_bytes={"side memories": self.merge_shards * memory},  # before they are merged into one
            peak_bytes={"writing into a memory": step * FLOAT32 + trained.kept_bytes(model, workload)},
            # All of them, the new state of one, the random numbers of a mask, and the values as they are recorded.
            host_bytes=(self.merge_shards + 3) * memory,
            journal_bytes=round(self.mask_share * memory),
            edit_operations=self.num_steps * (trained.operations(model) + margins) + trained.arriving_operations(model),
        )

    def adapter(self, lm: LanguageModel, cache: Cache, progress: Progress) -> SideMemoryAdapter:
        """Return the adapter without a memory."""
        layer = self._layer(lm.description)
        if self.layer is None:
            progress.message(f"method.layer is not set: side memory at layer {layer} of {lm.description.num_layers}, the published depth")
        description = lm.description
        return SideMemoryAdapter(
            site=lm.sites.mlp_out.format(layer), d_in=description.intermediate_size, d_out=description.hidden_size, rules=self.rules
        )

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor, which writes into the memories that are attached to the model (attached here where there are none).

        Raises:
            EditevalError: the adapter of another method is attached.
        """
        attach(self, model, cache, progress)
        if not isinstance(model.adapter, SideMemoryAdapter):
            raise EditevalError(f"WISE writes side memories, but a {type(model.adapter).__name__} is attached; load the model anew")
        with model.unedited():
            contexts = (
                context_prefixes(model.lm, self.prefix_lengths, seed=self.prefix_seed, cache=cache)
                if self.context_prefixes is None
                else tuple(self.context_prefixes)
            )
        prompts = tuple(request.full_prompt for request in self.irrelevant.load())
        layer = self._layer(model.lm.description)
        return Editor(lm=model.lm, layer=layer, adapter=model.adapter, contexts=contexts, irrelevant=prompts, settings=self)

    def _layer(self, model: ModelDescription) -> int:
        sites_for(model.model_type)
        return chosen_layer(model, self.layer, published_depth=PUBLISHED_DEPTH)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """WISE bound to a model and its side memories."""

    lm: LanguageModel
    layer: int
    adapter: SideMemoryAdapter
    contexts: tuple[str, ...]
    irrelevant: tuple[str, ...]
    settings: WISE

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the memory that answers with the fact, beside what it held.

        Raises:
            EditError: more or fewer than one request, or one that cannot be encoded or trained.
        """
        ids = [request.request_id for request in requests]
        if len(requests) != 1:
            raise EditError(f"WISE writes one fact an edit, got {len(requests)}; set batch_size=1", request_ids=ids)
        pairs = self._pairs(requests[0])
        rows = [
            TargetRow(
                request_id=requests[0].request_id,
                input_ids=(*pair.context, *pair.continuation[:-1]),
                positions=tuple(range(len(pair.context) - 1, len(pair.context) - 1 + len(pair.continuation))),
                tokens=pair.continuation,
            )
            for pair in pairs
        ]
        others = self._others(seed)
        number, memory = self.adapter.current()
        objective = Objective(
            batch=TuningBatch(self.lm, rows, first=self.layer),
            site=self.adapter.site,
            edited=site_inputs(self.lm, self.adapter.site, [pair.context for pair in pairs]),
            others=site_inputs(self.lm, self.adapter.site, others),
            settings=self.settings,
        )
        difference, losses = descend(objective, memory.difference, self.adapter.mask(memory.mask), self.settings)
        activation = float(objective.edited.activations(difference.to(objective.device)).min())
        if not bool(torch.isfinite(difference).all()):
            raise EditError("the memory is not finite after training; lower method.learning_rate", request_ids=ids)
        written = SideMemory(difference=difference, mask=memory.mask, activation=min(memory.activation, activation), edits=memory.edits + 1)
        diagnostics = {
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "steps": float(len(losses)),
            "activation": activation,
            "activation_irrelevant": float(objective.others.activations(difference.to(objective.device)).max()),
            "memory": float(number),
        }
        return Edit(deltas=(self.adapter.delta(number, written),), diagnostics=diagnostics)

    def _pairs(self, request: EditRequest) -> list[TokenPair]:
        """Return the prompt behind each context prefix, with the target, as the engine would read them.

        Raises:
            EditError: they cannot be encoded, or are longer than the model takes.
        """
        prompts = [context.replace("{}", request.full_prompt) for context in self.contexts]
        targets = [answer_after(prompt, request.target_new) for prompt in prompts]
        try:
            pairs = encode_answers(self.lm.tokenizer, prompts, targets, special_tokens=None)
        except EditevalError as error:
            raise EditError(str(error), request_ids=[request.request_id]) from error
        size, limit = max(len(pair.context) + len(pair.continuation) for pair in pairs), self.lm.description.max_positions
        if size > limit:
            raise EditError(
                f"the prompt and target have {size} tokens, the model takes at most {limit}; shorten the prompt",
                request_ids=[request.request_id],
            )
        return pairs

    def _others(self, seed: int) -> list[tuple[int, ...]]:
        """Return the tokens of the prompts that have nothing to do with this edit."""
        order = torch.randperm(len(self.irrelevant), generator=torch.Generator().manual_seed(seed))
        chosen = [self.irrelevant[number] for number in order[: self.settings.irrelevant_prompts].tolist()]
        return [tuple(self.lm.tokenizer(prompt)["input_ids"]) for prompt in chosen]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteInputs:
    """What the site gets at the tokens of some prompts: `inputs` (N, d_in), float32, and which prompt each token is of (N)."""

    inputs: Tensor
    prompts: Tensor

    def activations(self, difference_OI: Tensor) -> Tensor:
        """Return the activation of each prompt under this difference."""
        norms_N = (self.inputs @ difference_OI.T).norm(dim=1)
        counts = torch.bincount(self.prompts)
        return torch.zeros(len(counts), device=norms_N.device).index_add(0, self.prompts, norms_N) / counts


def site_inputs(lm: LanguageModel, site: str, rows: Sequence[Sequence[int]]) -> SiteInputs:
    """Run prompts up to the site; what comes before it is the unedited model, whatever the memories hold."""
    ids_BT = pad_rows(rows, lm.input_device)
    real_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    with torch.no_grad(), capture(lm.module, [site], inputs=True, stop=True) as trace:
        run_until(lm.module.base_model, input_ids=ids_BT, use_cache=False)
    states_BTI = trace.inputs[site]
    prompts = real_BT.nonzero()[:, 0].to(states_BTI.device)
    return SiteInputs(inputs=states_BTI[real_BT.to(states_BTI.device)].float(), prompts=prompts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss of an edit as a function of the memory's difference (d_out, d_in)."""

    batch: TuningBatch
    site: str
    edited: SiteInputs
    others: SiteInputs
    settings: WISE

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.edited.inputs.device

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the loss, with its graph."""
        in_scope = self.edited.activations(difference)
        out_of_scope = self.others.activations(difference)
        settings = self.settings
        apart = settings.gamma - (in_scope[:, None] - out_of_scope[None])
        margins = (out_of_scope - settings.alpha, settings.beta - in_scope, apart)
        return self.batch.loss({self.site: difference}) + sum((violated(margin) for margin in margins), torch.zeros((), device=self.device))


def violated(margins: Tensor) -> Tensor:
    """Return the mean of the margins that are not kept, as the published code takes it; 0 where all are."""
    positive = margins.clamp(min=0)
    return positive.sum() / (margins > 0).sum().clamp(min=1)


def descend(objective: Objective, start: Tensor, mask: Tensor, settings: WISE) -> tuple[Tensor, tuple[float, ...]]:
    """Return the difference after at most `num_steps` steps within the mask (float32 on the CPU), and the loss before each.

    It ends early where the loss is below `stop_loss` and steady.
    """
    difference = start.to(objective.device).clone()
    moving = mask.to(objective.device)
    losses: list[float] = []
    for _ in range(settings.num_steps):
        with torch.enable_grad():
            variable = difference.requires_grad_()
            loss = objective(variable)
            (gradient,) = torch.autograd.grad(loss, variable)
        losses.append(float(loss.detach()))
        if len(losses) > 1 and losses[-1] <= settings.stop_loss and abs(losses[-1] - losses[-2]) <= STEADY:
            break
        moved = difference.detach() - settings.learning_rate * torch.where(moving, gradient, 0.0)
        # Elements outside this mask are those of no edit, so the bound is on the whole.
        difference = moved.clamp(-settings.max_change, settings.max_change)
    return difference.detach().cpu(), tuple(losses)
