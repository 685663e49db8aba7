"""The upper part of a model as a function of what is added at one layer: exact, and only where something changes.

A causal model's positions before the subject's last token do not depend on anything added there. One pass through the
whole model therefore gives their attention keys and values once; after that the model's own layers run from the edited layer up, on
the positions from the subject's last token on. Within the edited layer only that one position runs; in the last layer, what follows
attention runs at the positions that are looked at; in those between, MLPs leave out the padding behind shorter rows.

Shapes: B rows, T positions of the longest row, P positions before the subject's last token (at most), S from it on, N looked at, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from editeval.keyvalue.lookup import Located
from editeval.models.model import LanguageModel
from editeval.models.trace import capture, replace_output
from editeval.types import EditError

ATTENTIONS = ("eager", "sdpa")


def require_masks(lm: LanguageModel) -> None:
    """Check that the attention kernel takes a mask of positions.

    Raises:
        EditError: it does not.
    """
    attention = lm.module.config._attn_implementation
    if attention not in ATTENTIONS:
        raise EditError(f"attention {attention!r} takes no mask of positions; load the model with one of {', '.join(ATTENTIONS)}")


def next_token_logits(lm: LanguageModel, hidden_ND: Tensor) -> Tensor:
    """Return float32 logits (N, vocabulary) of final hidden states taken before the last norm."""
    hidden_ND = lm.module.get_submodule(lm.sites.final_norm)(hidden_ND)
    logits: Tensor = lm.module.get_submodule(lm.sites.head)(hidden_ND).float()
    cap = getattr(lm.module.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device, *, width: int = 0) -> Tensor:
    """Return token ids (B, T), padded on the right to the longest row or `width`: attention is causal, so padding is never seen.

    The row's own last token is repeated; the tokenizer's pad token would make transformers warn of a missing mask.
    """
    width = max(width, *(len(row) for row in rows))
    return torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], dtype=torch.long, device=device)


def first_tensor(output: Any) -> Tensor:
    """Return what a layer makes of its hidden states, which may come with other things in a tuple."""
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value


class SuffixPass:
    """Rows of tokens whose positions before the subject's last token were computed once.

    `site_inputs` and `site_outputs` hold, by path, what went into and came out of the sites at the subject's last token:
    (B, width), float32, in the model's current state.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Located], *, layer: int, sites: Sequence[str], multiple: int = 1) -> None:
        """Run the whole model once over `rows`; `sites` are module paths in (or the path of) layer `layer`.

        P and S are rounded up to a multiple of `multiple`, so that fewer shapes come up; what is added is hidden.

        Raises:
            EditError: an attention kernel without masks, or layers with an argument that cannot be cut to some positions.
        """
        require_masks(lm)
        self._lm = lm
        self._layers = [lm.layer_module(lm.sites.layers, index) for index in range(layer, lm.description.num_layers)]
        self._sites = tuple(sites)
        paths = (lm.sites.attention_out, lm.sites.mlp)
        self._branches = tuple(lm.module.get_submodule(path.format(lm.description.num_layers - 1)) for path in paths)
        self._mlps = [lm.layer_module(lm.sites.mlp, index) for index in range(layer, lm.description.num_layers)]
        layer_path = lm.sites.layers.format(layer)
        device = lm.input_device
        num_prefix = _rounded_up(max(row.subject_last for row in rows), multiple)
        num_suffix = _rounded_up(max(len(row.input_ids) - row.subject_last for row in rows), multiple)
        ids_BT = pad_rows([row.input_ids for row in rows], device, width=num_prefix)
        self._width = ids_BT.shape[1]
        self._starts_B = torch.tensor([row.subject_last for row in rows], device=device)
        self._lengths_B = torch.tensor([len(row.input_ids) for row in rows], device=device)
        # Not where shapes are to be few: how many positions are no padding is a shape of its own.
        self._real = _real_positions(self._lengths_B - self._starts_B, num_suffix) if multiple == 1 else None
        cache = DynamicCache()
        calls: dict[int, dict[str, Any]] = {}
        with ExitStack() as stack, torch.no_grad():
            for number, module in enumerate(self._layers):
                stack.callback(module.register_forward_pre_hook(call_recorder(calls, number), with_kwargs=True).remove)
            trace = stack.enter_context(capture(lm.module, [*sites, layer_path], inputs=True, outputs=True))
            lm.module.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        self.site_inputs = {path: self._at_subject(trace.inputs[path]).float() for path in sites}
        self.site_outputs = {path: self._at_subject(trace.outputs[path]).float() for path in sites}
        self._first_input = self._at_subject(trace.inputs[layer_path])[:, None]
        self._frozen = FrozenPrefix(cache, layer=layer, num_prefix=num_prefix)
        self._later_outputs = self._take(trace.outputs[layer_path], self._positions(num_suffix))[:, 1:]
        one = Cut(starts_B=self._starts_B, lengths_B=self._lengths_B, num_prefix=num_prefix, num_suffix=1, width=self._width)
        all_ = Cut(starts_B=self._starts_B, lengths_B=self._lengths_B, num_prefix=num_prefix, num_suffix=num_suffix, width=self._width)
        self._arguments = [(one if number == 0 else all_).arguments(calls[number], self._frozen) for number in range(len(self._layers))]

    def hidden(self, added_BD: Mapping[str, Tensor], *, rows_N: Tensor, positions_N: Tensor) -> Tensor:
        """Return the last layer's output (N, D) when `added_BD[site]` is added to the site's output at the subject's last token.

        `positions_N` count from the subject's last token of each of `rows_N`, which is position 0; no pair may come twice.
        """
        return self.hidden_with({path: _adder(added_BD[path]) for path in self._sites}, rows_N=rows_N, positions_N=positions_N)

    def hidden_with(self, changes: Mapping[str, Callable[[Tensor], Tensor]], *, rows_N: Tensor, positions_N: Tensor) -> Tensor:
        """Return what `hidden` does when each site's output (B, 1, D) there becomes what `changes` makes of it."""
        with ExitStack() as stack:
            for path, change in changes.items():
                stack.enter_context(replace_output(self._lm.module, path, change))
            first = first_tensor(self._layers[0](self._first_input, **self._arguments[0]))
        hidden = torch.cat([first, self._later_outputs.to(first.device)], dim=1)
        last = len(self._layers) - 1
        for number in range(1, len(self._layers)):
            with only_at(self._branches, rows_N, positions_N) if number == last else self._without_padding(number):
                hidden = first_tensor(self._layers[number](hidden, **self._arguments[number]))
        return hidden[rows_N.to(hidden.device), positions_N.to(hidden.device)]

    def _without_padding(self, number: int) -> AbstractContextManager[None]:
        return nullcontext() if self._real is None else only_at([self._mlps[number]], *self._real)

    def tensors(self) -> list[Tensor]:
        """Return every tensor that `hidden` reads beside the model's own and its arguments, in an order that shapes alone decide."""
        found = [self._first_input, self._later_outputs, *self._frozen.tensors()]
        for arguments in self._arguments:
            for value in arguments.values():
                found += [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor)]
        return list({id(tensor): tensor for tensor in found}.values())  # layers share masks and positions

    def _at_subject(self, states_BTD: Tensor) -> Tensor:
        starts_B = self._starts_B.to(states_BTD.device)
        return states_BTD[torch.arange(len(starts_B), device=starts_B.device), starts_B]

    def _positions(self, num_suffix: int) -> Tensor:
        return (self._starts_B[:, None] + torch.arange(num_suffix, device=self._starts_B.device)).clamp(max=self._width - 1)

    @staticmethod
    def _take(states_BTD: Tensor, positions_BS: Tensor) -> Tensor:
        positions_BS = positions_BS.to(states_BTD.device)
        return states_BTD[torch.arange(len(positions_BS), device=positions_BS.device)[:, None], positions_BS]


@contextmanager
def only_at(modules: Sequence[nn.Module], rows_N: Tensor, positions_N: Tensor) -> Iterator[None]:
    """Within the context these modules, which act on each position alone, run at N positions of N rows and return zeros elsewhere."""

    def cut(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states_BSD = arguments[0]
        shapes.append(states_BSD.shape[:2])
        return (states_BSD.flatten(0, 1).index_select(0, index(states_BSD))[None], *arguments[1:])

    def spread(_: nn.Module, __: tuple[Any, ...], output_1ND: Tensor) -> Tensor:
        shape = shapes[-1]
        nothing = output_1ND.new_zeros(shape.numel(), output_1ND.shape[-1])
        return nothing.index_copy(0, index(output_1ND), output_1ND[0]).view(*shapes.pop(), -1)

    def index(states: Tensor) -> Tensor:
        return (rows_N * shapes[-1][1] + positions_N).to(states.device)

    shapes: list[torch.Size] = []
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(cut).remove)
            stack.callback(module.register_forward_hook(spread).remove)
        yield


class FrozenPrefix(Cache):
    """Attention keys and values of the first `num_prefix` positions; never grows."""

    def __init__(self, cache: DynamicCache, *, layer: int, num_prefix: int) -> None:
        super().__init__(layers=[])
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for index in range(layer, len(cache.layers)):
            stored = cache.layers[index]
            assert isinstance(stored, DynamicLayer)
            assert stored.keys is not None
            assert stored.values is not None
            self._pairs[index] = (stored.keys[:, :, :num_prefix], stored.values[:, :, :num_prefix])

    def tensors(self) -> list[Tensor]:
        """Return the stored keys and values, layer by layer."""
        return [tensor for pair in self._pairs.values() for tensor in pair]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the frozen keys and values followed by the new ones, storing nothing; the new rows may be copies of the frozen ones."""
        keys, values = self._pairs[layer_idx]
        copies = len(key_states) // len(keys)
        if copies > 1:
            keys, values = keys.repeat(copies, 1, 1, 1), values.repeat(copies, 1, 1, 1)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


class Cut:
    """Cuts the arguments that a layer got for all T positions to S positions from `starts_B` on, behind P frozen ones."""

    def __init__(self, *, starts_B: Tensor, lengths_B: Tensor, num_prefix: int, num_suffix: int, width: int) -> None:
        self._width = width
        steps_S = torch.arange(num_suffix, device=starts_B.device)
        prefix_P = torch.arange(num_prefix, device=starts_B.device)
        queries_BS = starts_B[:, None] + steps_S
        keys_BK = torch.cat([prefix_P.expand(len(starts_B), -1), queries_BS], dim=1)
        is_prefix_K = torch.arange(num_prefix + num_suffix, device=starts_B.device) < num_prefix
        # A frozen column is a real earlier position only up to the row's own subject; a new one only up to the row's end.
        self._real_BK = torch.where(is_prefix_K, keys_BK < starts_B[:, None], keys_BK < lengths_B[:, None])
        self._queries_BS = queries_BS.clamp(max=width - 1)
        self._keys_BK = keys_BK.clamp(max=width - 1)
        self._masks: dict[int, Tensor] = {}

    def arguments(self, call: Mapping[str, Any], frozen: Cache) -> dict[str, Any]:
        """Return the keyword arguments of a layer's recorded call, cut; hidden states left out."""
        cut: dict[str, Any] = {}
        for name, value in call.items():
            if name == "attention_mask":
                cut[name] = self._mask(value)
            elif name == "position_ids" and isinstance(value, Tensor):
                cut[name] = self._queries_BS.to(value.device)
            elif name == "position_embeddings" and value is not None:
                cut[name] = tuple(self._rotary(part) for part in value)
            elif isinstance(value, Cache):
                cut[name] = frozen
            elif isinstance(value, Tensor):
                raise EditError(
                    f"a layer takes the tensor argument {name!r} of shape {tuple(value.shape)}, which cannot be cut to some positions; "
                    "add it to editeval/keyvalue/suffix.py"
                )
            else:
                cut[name] = value
        return cut

    def _rotary(self, part_1TD: Tensor) -> Tensor:
        if part_1TD.shape[:2] != (1, self._width):
            raise EditError(f"rotary embeddings have the shape {tuple(part_1TD.shape)}, expected (1, {self._width}, width of a head)")
        return part_1TD[0][self._queries_BS.to(part_1TD.device)]

    def _mask(self, mask_11TT: Tensor | None) -> Tensor:
        """Return (B, 1, S, P + S) in the kind of mask that the layer got; none means plain causal attention."""
        key = id(mask_11TT)
        if key not in self._masks:
            self._masks[key] = self._cut_mask(mask_11TT)
        return self._masks[key]

    def _cut_mask(self, mask_11TT: Tensor | None) -> Tensor:
        positions_T = torch.arange(self._width, device=self._queries_BS.device)
        if mask_11TT is None:
            seen_TT = positions_T[:, None] >= positions_T
        elif mask_11TT.dtype == torch.bool:
            seen_TT = mask_11TT[0, 0].to(positions_T.device)
        else:
            lowest = torch.finfo(mask_11TT.dtype).min
            if not bool(((mask_11TT == 0) | (mask_11TT <= lowest)).all()):
                raise EditError(
                    "the attention mask holds biases (such as ALiBi); only masks that hide or show can be cut to some positions"
                )
            seen_TT = (mask_11TT[0, 0] == 0).to(positions_T.device)
        seen_BSK = seen_TT[self._queries_BS[:, :, None], self._keys_BK[:, None, :]] & self._real_BK[:, None, :]
        seen_B1SK = seen_BSK[:, None]
        if mask_11TT is None or mask_11TT.dtype == torch.bool:
            return seen_B1SK
        return torch.zeros(seen_B1SK.shape, dtype=mask_11TT.dtype, device=seen_B1SK.device).masked_fill(
            ~seen_B1SK, torch.finfo(mask_11TT.dtype).min
        )


def call_recorder(calls: dict[int, dict[str, Any]], number: int) -> Any:
    """Return a hook that keeps, under `number`, what a layer is called with beside its hidden states."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*arguments, **keywords)
        call: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            # `**kwargs` of the layer come back as one mapping under the name of that parameter.
            is_rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            call.update(value if is_rest else {name: value})
        call.pop("hidden_states")
        calls[number] = call

    return hook


def _real_positions(lengths_B: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
    """Return rows and positions (N) of what is no padding in rows of these lengths; None: nothing is."""
    real_BS = torch.arange(width, device=lengths_B.device) < lengths_B[:, None]
    if bool(real_BS.all()):
        return None
    rows_N, positions_N = real_BS.nonzero(as_tuple=True)
    return rows_N, positions_N


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _adder(added_BD: Tensor) -> Any:
    def add(output_B1D: Tensor) -> Tensor:
        return output_B1D + added_BD.to(device=output_B1D.device, dtype=output_B1D.dtype)[:, None]

    return add
