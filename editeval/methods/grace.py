"""GRACE: leave the weights alone; replace a layer's output where a prompt ends near a prompt that was edited.

Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", arXiv:2211.11031.

    python launch.py method=grace num_edits=10

A codebook at one site holds keys k_i, values v_i, radii epsilon_i and labels y_i. The query q of a prompt is the site's input at its last
token. An edit with label y finds the nearest key, at distance d (algorithm 1):

- d > epsilon_i + epsilon_init, or an empty codebook: insert (q, v, epsilon_init, y);
- else y_i = y: stretch the radius to cover the prompt, epsilon_i = max(epsilon_i, d), and train v_i again;
- else split: epsilon_i = d/2, less a hair, so that a query halfway is the new entry's, and insert (q, v, d/2, y). Where d is rounding, the
  entry itself is written anew: the published rule would leave two empty balls, and the fact could never be changed.

The value is what makes the model say the target: Adam on its cross-entropy, from a random or the present output of the site.

Where no prompt ends there is no query: a text that is scored as a whole (perplexity, wikitext) is that of the unedited model, whatever the
codebook holds and wherever `key_position` takes the query, so such a score says nothing of GRACE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.adapters_codebook import KEY_POSITIONS, REPLACE, CodebookAdapter, CodebookEntry, Nearest, codebook_delta
from editeval.inference.edited import EditedModel
from editeval.inference.encoding import TokenPair, answer_after, encode_answers
from editeval.interfaces import attach
from editeval.keyvalue.footprint import FLOAT32, PROMPT_TOKENS, TARGET_TOKENS, mlp_maps
from editeval.keyvalue.footprint_gradient import GradientPass
from editeval.keyvalue.lookup import Located
from editeval.keyvalue.settings import chosen_layer
from editeval.keyvalue.suffix import SuffixPass, next_token_logits
from editeval.keyvalue.upper import UpperPass
from editeval.models.model import LanguageModel
from editeval.models.sites import sites_for
from editeval.models.trace import replace_output
from editeval.types import ConfigError, EditError, EditevalError, EditRequest, Footprint, ModelDescription, Progress, Workload

PUBLISHED_DEPTH = 35 / 48  # layer 35 of GPT-2 XL's 48
INT64 = 8
VALUE_INITS = ("cold", "warm")
HAIR = 1e-5  # by which the older ball of a split is smaller (published code)
SAME_KEY = 1e-4  # distance relative to the key's norm below which two keys are one prompt's, told apart by rounding alone


@dataclass(frozen=True, kw_only=True)
class GRACE:
    """GRACE's settings; published numbers are in conf/method/grace.yaml and conf/tuned/grace.

    `layer` None means the published relative depth. `site` is `mlp_in`, `mlp_out`, or None: the map into the MLP, in gated MLPs, where
    there are two, the map out of it (as published). See `CodebookAdapter` for `replace` and `key_position`.
    """

    max_batch_size: ClassVar[int | None] = 1

    name: str
    layer: int | None
    site: str | None
    num_steps: int
    learning_rate: float
    epsilon: float
    value_init: str
    replace: str
    key_position: str

    def __post_init__(self) -> None:
        allowed = {"value_init": VALUE_INITS, "replace": REPLACE, "key_position": KEY_POSITIONS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"method.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(values)}")
        if self.num_steps < 1 or not self.learning_rate > 0 or not self.epsilon > 0:
            raise ConfigError(
                f"num_steps={self.num_steps} (at least 1), learning_rate={self.learning_rate} and epsilon={self.epsilon} must be above 0; "
                "set them under method"
            )

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}

    def check(self, model: ModelDescription) -> None:
        """Check layer and site against the model's shape.

        Raises:
            ConfigError: what, with what is allowed.
        """
        self._place(model)

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes; an edit writes one entry (two where it splits one, which is rare)."""
        whole = self.replace == "prompt"
        trained = GradientPass(first=0 if whole else self._place(model)[0], rows=1, tokens=PROMPT_TOKENS if whole else TARGET_TOKENS)
        key_and_value = sum(mlp_maps(model, 1)[0].shape) * FLOAT32
        return Footprint(
            peak_bytes={"training a value": trained.kept_bytes(model, workload)},
            host_bytes=2 * key_and_value,
            journal_bytes=key_and_value + INT64 * (TARGET_TOKENS + 3),  # the label; radius, number and position
            edit_operations=self.num_steps * trained.operations(model)
            + GradientPass(first=model.num_layers, rows=1).arriving_operations(model),
        )

    def adapter(self, lm: LanguageModel, cache: Cache, progress: Progress) -> CodebookAdapter:
        """Return an empty codebook at the site."""
        layer, site = self._place(lm.description)
        if self.layer is None:
            depth = f"layer {layer} of {lm.description.num_layers}"
            progress.message(f"method.layer is not set: codebook at {depth}, the published relative depth")
        d_in, d_out = (int(size) for size in lm.module.get_submodule(site).get_parameter("weight").shape)
        if not lm.sites.transposed:
            d_in, d_out = d_out, d_in
        return CodebookAdapter(site=site, d_in=d_in, d_out=d_out, replace=self.replace, key_position=self.key_position)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor, which adds to the codebook that is attached to the model (attached here where there is none).

        Raises:
            EditevalError: the adapter of another method is attached.
        """
        attach(self, model, cache, progress)
        if not isinstance(model.adapter, CodebookAdapter):
            raise EditevalError(f"GRACE adds to a codebook, but a {type(model.adapter).__name__} is attached; load the model anew")
        return Editor(lm=model.lm, layer=self._place(model.lm.description)[0], codebook=model.adapter, settings=self)

    def _place(self, model: ModelDescription) -> tuple[int, str]:
        """Return the layer and the site's path."""
        layer = chosen_layer(model, self.layer, published_depth=PUBLISHED_DEPTH)
        sites = sites_for(model.model_type)
        maps = {"mlp_out": sites.mlp_out} | ({"mlp_in": sites.mlp_in[0]} if not sites.gated else {})
        chosen = self.site or ("mlp_out" if sites.gated else "mlp_in")
        if chosen not in maps:
            raise ConfigError(f"method.site={chosen!r} is no single linear map of {model.model_type}; choose one of {', '.join(maps)}")
        return layer, maps[chosen].format(layer)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """GRACE bound to a model and the codebook attached to it."""

    lm: LanguageModel
    layer: int
    codebook: CodebookAdapter
    settings: GRACE

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the entries that write one fact.

        Raises:
            EditError: more or fewer than one request, or one that cannot be encoded or trained.
        """
        ids = [request.request_id for request in requests]
        if len(requests) != 1:
            raise EditError(f"GRACE writes one fact an edit, got {len(requests)}; set batch_size=1", request_ids=ids)
        pair = _encode(self.lm, requests[0])
        prompt_end = len(pair.context) - 1
        row = Located(token_ids=(*pair.context, *pair.continuation), subject_last=prompt_end, target_start=prompt_end + 1)
        site = self.codebook.site
        with self.lm.packed_products():
            upper = SuffixPass(self.lm, [row], layer=self.layer, sites=[site])
            present = upper.site_outputs[site]
            fresh = CodebookEntry(
                key=upper.site_inputs[site][0].cpu(),
                value=present[0].cpu() if self.settings.value_init == "warm" else cold_value(present.shape[1], seed=seed),
                epsilon=self.settings.epsilon,
                label=pair.continuation,
            )
            growth = grow(self.codebook.entries, fresh, self.codebook.nearest(fresh.key))
            start = growth.entries[growth.trained].value.to(present.device)
            loss_of = self._loss_over_prompt(row) if self.settings.replace == "prompt" else _loss_at_end(self.lm, upper, site, pair)
            value, losses = train_value(loss_of, start, num_steps=self.settings.num_steps, learning_rate=self.settings.learning_rate)
        if not bool(torch.isfinite(value).all()):
            raise EditError("the value is not finite after training; lower method.learning_rate", request_ids=ids)
        entries = {**growth.entries, growth.trained: replace(growth.entries[growth.trained], value=value.cpu())}
        diagnostics = {
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "entries": float(max(len(self.codebook.entries), *(number + 1 for number in entries))),
            "inserted": float(growth.trained == len(self.codebook.entries)),
            "split": float(len(entries) > 1),
            "epsilon": entries[growth.trained].epsilon,
            "value_norm": float(value.norm()),
        }
        return Edit(deltas=(codebook_delta(site, entries, position=prompt_end),), diagnostics=diagnostics)

    def _loss_over_prompt(self, row: Located) -> Callable[[Tensor], Tensor]:
        """Return the loss as a function of a value that stands at every token of the prompt, by the site's layer and those above it."""
        upper = UpperPass(self.lm, [row.input_ids], first=self.layer)
        targets = torch.tensor(row.target_ids)

        def loss(value: Tensor) -> Tensor:
            def put(output: Tensor) -> Tensor:
                head = value.to(output.dtype).expand(1, row.target_start, -1)
                return torch.cat([head, output[:, row.target_start :]], dim=1)

            with replace_output(self.lm.module, self.codebook.site, put):
                hidden_BTD = upper.hidden()
            # Logits at every position, as the model itself makes them: fewer rows in the product would round otherwise.
            logits = next_token_logits(self.lm, hidden_BTD)[0, row.target_start - 1 :]
            return torch.nn.functional.cross_entropy(logits, targets.to(logits.device))

        return loss


@dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
    """What an edit does to the codebook before its value is trained: entries by number, and whose value is trained."""

    entries: dict[int, CodebookEntry]
    trained: int


def grow(entries: Sequence[CodebookEntry], fresh: CodebookEntry, nearest: Nearest | None) -> Growth:
    """Return the entries that change when `fresh` (with epsilon_init as its radius) comes: insert, stretch or split (algorithm 1)."""
    new = len(entries)
    if nearest is None or nearest.distance > entries[nearest.entry].epsilon + fresh.epsilon:
        return Growth(entries={new: fresh}, trained=new)
    old = entries[nearest.entry]
    if old.label == fresh.label:
        stretched = replace(old, epsilon=max(old.epsilon, nearest.distance))
        return Growth(entries={nearest.entry: stretched}, trained=nearest.entry)
    if nearest.distance <= SAME_KEY * float(old.key.norm()):
        return Growth(entries={nearest.entry: replace(fresh, epsilon=old.epsilon)}, trained=nearest.entry)
    half = nearest.distance / 2
    shrunk = replace(old, epsilon=max(half - HAIR, 0.0))
    return Growth(entries={nearest.entry: shrunk, new: replace(fresh, epsilon=half)}, trained=new)


def cold_value(width: int, *, seed: int) -> Tensor:
    """Return a value drawn uniformly from [0, 1) (width,), as the published code starts."""
    return torch.rand(width, generator=torch.Generator().manual_seed(seed))


def train_value(
    loss_of: Callable[[Tensor], Tensor], start: Tensor, *, num_steps: int, learning_rate: float
) -> tuple[Tensor, tuple[float, ...]]:
    """Return the value (d_out) after `num_steps` steps of Adam from `start`, and the loss (nats a target token) before each."""
    losses = []
    with torch.enable_grad():
        value = start.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([value], lr=learning_rate)
        for _ in range(num_steps):
            loss = loss_of(value)
            losses.append(float(loss.detach()))
            (value.grad,) = torch.autograd.grad(loss, value)
            optimizer.step()
    return value.detach(), tuple(losses)


def _loss_at_end(lm: LanguageModel, upper: SuffixPass, site: str, pair: TokenPair) -> Callable[[Tensor], Tensor]:
    """Return the loss as a function of a value that stands at the prompt's last token, by the layers above the site alone."""
    targets = torch.tensor(pair.continuation)
    positions_N = torch.arange(len(targets))
    rows_N = torch.zeros_like(positions_N)

    def loss(value: Tensor) -> Tensor:
        def put(output_11D: Tensor) -> Tensor:
            # In place of the output, as at inference: added to it, the difference would round to another value in half precision.
            return value.to(output_11D.dtype).expand_as(output_11D)

        hidden = upper.hidden_with({site: put}, rows_N=rows_N, positions_N=positions_N)
        return torch.nn.functional.cross_entropy(next_token_logits(lm, hidden), targets.to(hidden.device))

    return loss


def _encode(lm: LanguageModel, request: EditRequest) -> TokenPair:
    """Return prompt and target as the engine reads them, so that the key is where it will be looked for.

    Raises:
        EditError: they cannot be encoded, or are longer than the model takes.
    """
    try:
        prompt = request.full_prompt
        (pair,) = encode_answers(lm.tokenizer, [prompt], [answer_after(prompt, request.target_new)], special_tokens=None)
    except EditevalError as error:
        raise EditError(str(error), request_ids=[request.request_id]) from error
    size = len(pair.context) + len(pair.continuation)
    if size > lm.description.max_positions:
        raise EditError(
            f"the prompt and target have {size} tokens, the model takes at most {lm.description.max_positions}; shorten the prompt",
            request_ids=[request.request_id],
        )
    return pair
