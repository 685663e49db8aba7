"""Where things are in each architecture: one frozen record a `config.model_type`.

Paths are relative to the causal-LM module; `{}` stands for the layer's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from transformers.pytorch_utils import Conv1D

from editeval.types import ConfigError

MAPS = ("mlp_in", "mlp_gate", "mlp_up", "mlp_out")
"""Kinds of linear maps of an MLP, as settings name them; `mlp_in` is every map into it."""


@dataclass(frozen=True, kw_only=True)
class Sites:
    """The named places that methods hook or edit.

    `transposed` says that the linear maps of the blocks store (d_in, d_out), as GPT-2's Conv1D does. `mlp_in` are the maps
    into the MLP (gate first, then up, in gated MLPs; one path where they are fused); `mlp_out` the map out of it, whose input is the
    key and whose output the value of locate-then-edit methods. `mlp_norm` is the norm of the MLP's branch: before it as a rule, GPT-J's is
    shared with attention, OLMo-2's comes after the MLP.
    """

    model_type: str
    layers: str
    mlp: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    attention: str
    attention_out: str
    mlp_norm: str
    final_norm: str
    head: str
    embedding: str
    transposed: bool = False
    gated: bool = False

    def num_layers(self, module: nn.Module) -> int:
        """Return how many layers this loaded model has.

        Raises:
            ConfigError: the model has no list of layers at `layers`.
        """
        layers = self._find(module, self.layers.removesuffix(".{}"))
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise ConfigError(f"{self.model_type}: {self.layers!r} is no list of layers, got {type(layers).__name__}; {self._advice}")
        return len(layers)

    def check(self, module: nn.Module) -> None:
        """Check that every site exists in the first and the last layer, and that the linear maps store what `transposed` says.

        Raises:
            ConfigError: a path that the model does not have, or a map of the other orientation; names the site.
        """
        last = self.num_layers(module) - 1
        for path in self._paths():
            for layer in {0, last}:
                self._find(module, path.format(layer))
        expected: type[nn.Module] = Conv1D if self.transposed else nn.Linear
        for path in (*self.mlp_in, self.mlp_out, self.attention_out):
            linear = self._find(module, path.format(last))
            if not isinstance(linear, expected):
                raise ConfigError(
                    f"{self.model_type}: {path.format(last)!r} is a {type(linear).__name__}, expected {expected.__name__} "
                    f"(transposed={self.transposed}); {self._advice}"
                )
            weight = linear.get_parameter("weight")
            if not weight.is_floating_point():
                raise ConfigError(
                    f"{self.model_type}: {path.format(last)!r} stores {weight.dtype}, quantised weights cannot be edited; "
                    "load the unquantised checkpoint"
                )

    def maps_of(self, kind: str) -> tuple[str, ...]:
        """Return the paths of the MLP's linear maps of a kind, one of `MAPS`.

        Raises:
            ConfigError: a gate or an up map where there is none of its own.
        """
        if kind in ("mlp_in", "mlp_out"):
            return self.mlp_in if kind == "mlp_in" else (self.mlp_out,)
        if len(self.mlp_in) != 2:
            raise ConfigError(f"{self.model_type} has no map {kind} of its own; set method.maps to mlp_in or mlp_out")
        return (self.mlp_in[0 if kind == "mlp_gate" else 1],)

    def _paths(self) -> tuple[str, ...]:
        """Return every path of the record."""
        branches = (self.layers, self.mlp, *self.mlp_in, self.mlp_out, self.attention, self.attention_out, self.mlp_norm)
        return (*branches, self.final_norm, self.head, self.embedding)

    def _find(self, module: nn.Module, path: str) -> nn.Module:
        try:
            return module.get_submodule(path)
        except AttributeError as error:
            raise ConfigError(f"{self.model_type}: no module at {path!r} ({error}); {self._advice}") from error

    @property
    def _advice(self) -> str:
        return f"correct the Sites record of {self.model_type!r} in editeval/models/sites.py"


def sites_for(model_type: str) -> Sites:
    """Return the sites of an architecture, by its `config.model_type`.

    Raises:
        ConfigError: an architecture that is not in the table; says what to add.
    """
    try:
        return SITES[model_type]
    except KeyError:
        raise ConfigError(
            f"architecture {model_type!r} is unknown; known: {', '.join(SITES)}. To add it, write a `Sites` record with "
            f"model_type={model_type!r} into the table in editeval/models/sites.py: the paths of its layers, MLP, attention, norms, head "
            "and embedding (print the loaded module to see them)"
        ) from None


def _gpt2() -> Sites:
    """GPT-2: absolute positions, Conv1D maps that store (d_in, d_out)."""
    return Sites(
        model_type="gpt2",
        layers="transformer.h.{}",
        mlp="transformer.h.{}.mlp",
        mlp_in=("transformer.h.{}.mlp.c_fc",),
        mlp_out="transformer.h.{}.mlp.c_proj",
        attention="transformer.h.{}.attn",
        attention_out="transformer.h.{}.attn.c_proj",
        mlp_norm="transformer.h.{}.ln_2",
        final_norm="transformer.ln_f",
        head="lm_head",
        embedding="transformer.wte",
        transposed=True,
    )


def _gptj() -> Sites:
    """GPT-J: attention and MLP in parallel behind one norm."""
    return Sites(
        model_type="gptj",
        layers="transformer.h.{}",
        mlp="transformer.h.{}.mlp",
        mlp_in=("transformer.h.{}.mlp.fc_in",),
        mlp_out="transformer.h.{}.mlp.fc_out",
        attention="transformer.h.{}.attn",
        attention_out="transformer.h.{}.attn.out_proj",
        mlp_norm="transformer.h.{}.ln_1",
        final_norm="transformer.ln_f",
        head="lm_head",
        embedding="transformer.wte",
    )


def _gpt_neox() -> Sites:
    """GPT-NeoX (Pythia): attention and MLP in parallel, each behind its own norm."""
    return Sites(
        model_type="gpt_neox",
        layers="gpt_neox.layers.{}",
        mlp="gpt_neox.layers.{}.mlp",
        mlp_in=("gpt_neox.layers.{}.mlp.dense_h_to_4h",),
        mlp_out="gpt_neox.layers.{}.mlp.dense_4h_to_h",
        attention="gpt_neox.layers.{}.attention",
        attention_out="gpt_neox.layers.{}.attention.dense",
        mlp_norm="gpt_neox.layers.{}.post_attention_layernorm",
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head",
        embedding="gpt_neox.embed_in",
    )


def _llama_like(
    model_type: str, *, mlp_in: tuple[str, ...] = ("gate_proj", "up_proj"), mlp_norm: str = "post_attention_layernorm"
) -> Sites:
    """Llama and the families that keep its module names: gated MLP, RMS norms."""
    return Sites(
        model_type=model_type,
        layers="model.layers.{}",
        mlp="model.layers.{}.mlp",
        mlp_in=tuple(f"model.layers.{{}}.mlp.{name}" for name in mlp_in),
        mlp_out="model.layers.{}.mlp.down_proj",
        attention="model.layers.{}.self_attn",
        attention_out="model.layers.{}.self_attn.o_proj",
        mlp_norm=f"model.layers.{{}}.{mlp_norm}",
        final_norm="model.norm",
        head="lm_head",
        embedding="model.embed_tokens",
        gated=True,
    )


_TABLE = (
    _gpt2(),
    _gptj(),
    _gpt_neox(),
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("gemma2", mlp_norm="pre_feedforward_layernorm"),
    _llama_like("olmo2", mlp_norm="post_feedforward_layernorm"),
    _llama_like("phi3", mlp_in=("gate_up_proj",)),
)

SITES: Mapping[str, Sites] = MappingProxyType({sites.model_type: sites for sites in _TABLE})
