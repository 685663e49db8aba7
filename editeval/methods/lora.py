"""LoRA: fine-tune low-rank factors of attention's maps on the facts of one edit, through `peft`, and merge them.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    python launch.py method=lora num_edits=10

For each target map, dW = (alpha / rank) B A with B = 0 at the start. The factors are trained by Adam on the tokens of the targets, then
recorded as a low-rank update, so that edits accumulate in the weights and every benchmark runs the plain model. Each edit has factors of
its own; the code of EasyEdit trains one pair on along a sequence, whose rank does not grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from editeval.edits.adam import adam, new_moments
from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.fine_tuning import TuningBatch, target_row
from editeval.keyvalue.footprint import MapShape, all_mlp_maps
from editeval.keyvalue.footprint_gradient import factors_footprint
from editeval.keyvalue.spread import check_batch
from editeval.models.model import LanguageModel
from editeval.models.sites import sites_for
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload, seed_for

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "editeval"
FUSED: Mapping[str, int] = {"c_attn": 3, "query_key_value": 3, "qkv_proj": 3}  # maps that make queries, keys and values at once


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """LoRA's settings; published numbers are in conf/method/lora.yaml and conf/tuned/lora.

    `target_modules` are the ends of module names; None takes what peft knows of the architecture. `layers` None means all.
    """

    max_batch_size: ClassVar[int | None] = None

    name: str
    rank: int
    alpha: float
    target_modules: Sequence[str] | None
    layers: Sequence[int] | None
    num_steps: int
    learning_rate: float
    facts_per_step: int

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "num_steps", "learning_rate", "facts_per_step"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0; set method.{name}")

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        fields = ("rank", "alpha", "num_steps", "learning_rate", "facts_per_step")
        lists = {name: None if getattr(self, name) is None else list(getattr(self, name)) for name in ("target_modules", "layers")}
        return {**{name: getattr(self, name) for name in fields}, **lists}

    def check(self, model: ModelDescription) -> None:
        """Check layers and target modules.

        Raises:
            ConfigError: a layer that the model does not have, or an architecture whose attention peft does not know.
        """
        model.check_layers(self.layers or (), setting="method.layers")
        self._targets(model)

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes."""
        layers = self.layers or range(model.num_layers)
        maps = [_map_named(name, model) for name in self._targets(model)] * len(layers)
        size, epochs = self.facts_per_step, self.num_steps
        return factors_footprint(maps, model, workload, first=min(layers), rank=self.rank, rows_per_step=size, epochs=epochs)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor; nothing has to be made."""
        return Editor(lm=model.lm, targets=tuple(self._targets(model.lm.description)), method=self)

    def _targets(self, model: ModelDescription) -> Sequence[str]:
        if self.target_modules is not None:
            return self.target_modules
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        if model.model_type not in KNOWN:
            raise ConfigError(f"peft has no target modules for {model.model_type!r}; set method.target_modules, such as [q_proj,v_proj]")
        found: Sequence[str] = KNOWN[model.model_type]
        return found


def _map_named(name: str, model: ModelDescription) -> MapShape:
    """Return the shape of a map by the end of its name; what is not the MLP's is attention's, which has at most so many outputs."""
    sites = sites_for(model.model_type)
    named = dict(zip((*sites.mlp_in, sites.mlp_out), all_mlp_maps(model), strict=True))
    of_mlp = {path.rpartition(".")[2]: shape for path, shape in named.items()}
    return of_mlp.get(name, MapShape(d_out=FUSED.get(name, 1) * model.hidden_size, d_in=model.hidden_size))


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """LoRA bound to a model."""

    lm: LanguageModel
    targets: tuple[str, ...]
    method: LoRA

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the merged factors that make these facts likely; the seed draws the factors' start.

        Raises:
            EditError: facts that contradict each other, or one that cannot be encoded.
        """
        check_batch(requests)
        lm, method = self.lm, self.method
        limit = lm.description.max_positions
        rows = [target_row(lm.tokenizer, request, scored_at="target", max_tokens=limit) for request in requests]
        size = method.facts_per_step
        first = min(method.layers) if method.layers else 0
        batches = [TuningBatch(lm, rows[start : start + size], first=first) for start in range(0, len(rows), size)]
        with self._adapted(seed) as adapters:
            losses = self._train(batches, [factor for pair in adapters.values() for factor in pair])
            scale = method.alpha / method.rank
            deltas = tuple(
                LowRankDelta(parameter=f"{path}.weight", left=scale * _stored(left), right=_stored(right))
                for path, (right, left) in adapters.items()
            )
        return Edit(deltas=deltas, diagnostics={"loss_first": losses[0], "loss_last": losses[-1], "maps": float(len(deltas))})

    def _train(self, batches: Sequence[TuningBatch], factors: Sequence[Tensor]) -> list[float]:
        """Train the factors in place; return the loss of every step."""
        moments = [new_moments(factor.detach()) for factor in factors]
        losses: list[float] = []
        for batch in [*batches] * self.method.num_steps:
            loss = batch.loss({})
            losses.append(float(loss.detach()))
            gradients = torch.autograd.grad(loss, list(factors))
            with torch.no_grad():
                for factor, gradient, moment in zip(factors, gradients, moments, strict=True):
                    factor.copy_(adam(factor, gradient, moment, step=len(losses), learning_rate=self.method.learning_rate))
        return losses

    @contextmanager
    def _adapted(self, seed: int) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Within the context the model carries adapters: by path of the map A (rank, d_in) and B (d_out, rank), float32, trainable."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        module = self.lm.module
        originals: dict[str, nn.Module] = {}
        config = LoraConfig(
            r=self.method.rank,
            lora_alpha=self.method.alpha,
            lora_dropout=0.0,
            target_modules=list(self.targets),
            layers_to_transform=None if self.method.layers is None else list(self.method.layers),
            fan_in_fan_out=self.lm.sites.transposed,
            init_lora_weights=True,
        )
        trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        modes = [(each, each.training) for each in module.modules()]
        attributes = set(vars(module))
        try:
            with torch.random.fork_rng(devices=[]):
                # Alone: torch.manual_seed would seed every GPU's generator too. peft draws on the CPU, then moves.
                torch.default_generator.manual_seed(seed_for("lora", seed) % 2**32)
                inject_adapter_in_model(config, module, adapter_name=ADAPTER)
            layers = {name: each for name, each in module.named_modules() if isinstance(each, LoraLayer)}
            originals = {name: each.get_base_layer() for name, each in layers.items()}
            yield {
                name: (each.lora_A[ADAPTER].weight.requires_grad_(), each.lora_B[ADAPTER].weight.requires_grad_())
                for name, each in layers.items()
            }
        finally:
            for name, original in originals.items():
                module.set_submodule(name, original)
            for name in set(vars(module)) - attributes:  # peft leaves its config there
                delattr(module, name)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(trainable[name])
            for each, training in modes:
                each.training = training


def _stored(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.float32).contiguous().clone()
