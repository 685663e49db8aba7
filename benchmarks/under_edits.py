"""lm-eval's own engine under an edited model, written plainly and apart from our adapters: the other side of `eval_parity.py --edits`.

Edits of weights need nothing: HFLM wraps the same module. A codebook is a forward hook that knows one request at a time. What a memory
routes is asked of an HFLM around the model that answers it, with the examples and the fact written before the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from benchmarks.beside_harness import harness_engine
from benchmarks.memory_methods import Told
from editeval.datasets.selection import order
from editeval.edits.delta import CodebookDelta, Edit
from editeval.experiment import Experiment
from editeval.inference.adapters import RequestAdapter
from editeval.inference.edited import ANSWER_TOKENS, EditedModel
from editeval.types import EditRequest, seed_for

FACT_TOKENS = 12  # written after a prompt about a fact


@dataclass(frozen=True, kw_only=True)
class Edited:
    """A model after its edits, and what they were (method None: none)."""

    method: str | None
    model: EditedModel
    requests: tuple[EditRequest, ...] = ()
    edits: tuple[Edit, ...] = ()


def edited(method: str, experiment: Experiment, count: int) -> Edited:
    """Write the first `count` facts of an experiment into its model one after another."""
    model = EditedModel(experiment.source.load(), batch_tokens=experiment.batch_tokens)
    editor = experiment.method.prepare(model, experiment.cache, Told())
    requests = order(experiment.dataset.load(), seed=experiment.seed)[:count]
    edits = []
    for request in requests:
        edits.append(editor.edit([request], seed=seed_for("benchmark", request.request_id)))
        model.apply(edits[-1])
    return Edited(method=method, model=model, requests=tuple(requests), edits=tuple(edits))


def requests_about(facts: Sequence[EditRequest]) -> dict[str, list[Any]]:
    """Return requests about edited facts, by type: prompt, paraphrases and neighbours, with both targets scored and an answer written."""
    from lm_eval.api.instance import Instance

    asked: dict[str, list[Any]] = {"loglikelihood": [], "generate_until": []}
    for fact in facts:
        for prompt in (fact.full_prompt, *fact.paraphrase_prompts, *(probe.prompt for probe in fact.neighborhood_prompts[:2])):
            written: dict[str, Any] = {"until": ["\n"], "max_gen_toks": FACT_TOKENS, "do_sample": False}
            arguments: list[tuple[Any, tuple[str, Any]]] = [("generate_until", (prompt, written))]
            arguments += [("loglikelihood", (prompt, f" {target}")) for target in (fact.target_new, fact.target_true) if target]
            for kind, given in arguments:
                asked[kind].append(Instance(request_type=kind, doc={}, arguments=given, idx=len(asked[kind])))
    return asked


def reference_engine(model: EditedModel, edits: Sequence[Edit]) -> Any:
    """Return the harness's own engine under these edits, at batch size 1. `acted` counts the requests that edits act on."""
    from lm_eval.api.model import LM

    codebook = [delta for edit in edits for delta in edit.deltas if isinstance(delta, CodebookDelta)]
    if codebook:
        return type("CodebookLM", (CodebookReference, LM), {})(model, codebook)
    if isinstance(model.adapter, RequestAdapter):
        return type("RoutedLM", (RoutedReference, LM), {})(model, model.adapter)
    return harness_engine(model, batch_size=1)


class _Counted:
    """Answers one request after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.acted = 0

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Answer each request alone."""
        return [self.answer("loglikelihood", request) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request alone."""
        return [self.answer("generate_until", request) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Refuse: none of the compared benchmarks asks for it."""
        raise NotImplementedError

    def answer(self, kind: str, request: Any) -> Any:
        """Return the answer to one request."""
        raise NotImplementedError


class CodebookReference(_Counted):
    """HFLM over the bare module, and a codebook (arXiv:2211.11031, equation 1) that is read from the recorded edits."""

    def __init__(self, model: EditedModel, deltas: Sequence[CodebookDelta]) -> None:
        super().__init__()
        self._engine = harness_engine(model, batch_size=1)
        self._site = model.lm.module.get_submodule(deltas[0].site)
        self._entries: dict[int, tuple[Tensor, Tensor, float]] = {}
        for delta in deltas:
            for row, number in enumerate(delta.entries.tolist()):
                self._entries[number] = (delta.keys[row], delta.values[row], float(delta.epsilons[row]))

    def answer(self, kind: str, request: Any) -> Any:
        """Return HFLM's answer to one request; the first pass reads the prompt, and only there the codebook acts."""
        end = -1  # a text is written behind all that is read first
        if kind == "loglikelihood":
            end = len(self._engine._encode_pair(*request.args)[0]) - 1
        first = True

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            nonlocal first
            if not first:
                return None
            first = False
            query = inputs[0][0, end]
            key, value, epsilon = min(self._entries.values(), key=lambda entry: float((query - entry[0]).norm()))
            if float((query - key).norm()) > epsilon:
                return None
            self.acted += 1
            changed = output.clone()
            changed[0, end] = value
            return changed

        handle = self._site.register_forward_hook(hook)
        try:
            return getattr(self._engine, kind)([request], disable_tqdm=True)[0]
        finally:
            handle.remove()


class RoutedReference(_Counted):
    """HFLM around the edited model, and around the one that a route names; the router decides by the text of each request alone."""

    def __init__(self, model: EditedModel, adapter: RequestAdapter) -> None:
        super().__init__()
        self._model = model
        self._adapter = adapter
        self._engines: dict[int, Any] = {}

    def answer(self, kind: str, request: Any) -> Any:
        """Return the answer of the model that the request goes to, behind what its route puts before it."""
        context, asked = request.args
        (route,) = self._adapter.routes([context])
        model = self._model
        if route is not None:
            self.acted += 1
            model = route.model or model
            context = "".join(route.demonstrations) + route.prefix + context
            most = model.lm.description.max_positions - (ANSWER_TOKENS if kind == "loglikelihood" else int(asked["max_gen_toks"]))
            if len(model.lm.tokenizer(context)["input_ids"]) > most:
                raise SystemExit(f"a routed request is longer than {most} tokens, so that examples would be left out; choose another task")
        if id(model) not in self._engines:
            self._engines[id(model)] = harness_engine(model, batch_size=1)
        return getattr(self._engines[id(model)], kind)([replace(request, arguments=(context, asked))], disable_tqdm=True)[0]
