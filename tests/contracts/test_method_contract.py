"""The contract of a method: twelve claims, made of every file of conf/method on tiny models of several architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast

from editeval.build import build
from editeval.edits.delta import DenseDelta, TunedDelta
from editeval.edits.encoding import encode
from editeval.edits.journal import EditJournal
from editeval.files import Cache
from editeval.inference.adapters import RequestAdapter
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod, Editor, EvaluationContext, ModelSource, Predictable
from editeval.keyvalue.settings import LocateSettings
from editeval.models.model import LanguageModel
from editeval.types import EditError, EditRequest, Footprint, Probe, SilentProgress, Workload, seed_for

CONF = Path(__file__).resolve().parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
CONTROLS = {"none"}  # methods whose edit is meant to change nothing
NOISE = {"random"}  # methods whose edit is meant to change weights, but to write no fact
MODELS = sorted(path.stem for path in (CONF / "model").glob("tiny-*.yaml"))
CORE_MODELS = ("tiny-gpt2", "tiny-llama", "tiny-neox")  # absolute positions and turned weights, gated MLPs, parallel blocks
GENESIS = "0" * 64

REQUESTS = (
    EditRequest(
        request_id="a",
        prompt="The mother tongue of {} is",
        subject="Danielle Darrieux",
        target_new="English",
        target_true="French",
        paraphrase_prompts=("Danielle Darrieux speaks the language",),
        neighborhood_prompts=(Probe(prompt="The mother tongue of Michel Rocard is", answer="French"),),
    ),
    EditRequest(request_id="b", prompt="{} is the capital of", subject="Port Moresby", target_new="Norway", target_true="Papua New Guinea"),
    EditRequest(request_id="c", prompt="In which city was {} founded? It was", subject="Nokia", target_new="Tampa", target_true="Espoo"),
)

# Facts whose target is one word of any tokenizer and comes right after the subject: what an edit writes at the subject's last token acts on
# the very position that predicts it. Further on only attention carries it, and that of a random model does so by chance: over seeds of the
# models, a single gain of REQUESTS, which have words between, lies anywhere between -3 and 10 nats.
DIRECT = tuple(
    EditRequest(request_id=name, prompt=prompt, subject=subject, target_new=target, target_true="to")
    for name, prompt, subject, target in (
        ("d", "All of them went to {}", "Papua New Guinea", "and"),
        ("e", "The one they named was {}", "Danielle Darrieux", "that"),
        ("f", "This is {}", "Nokia", "with"),
    )
)


@dataclass
class Bench:
    """A model, a method and its editor."""

    model: EditedModel
    method: EditMethod
    editor: Editor
    cache: Cache

    def edit(self, *requests: EditRequest) -> list[str]:
        """Edit one by one, as the runner does; returns the weight digest after each."""
        digests = []
        for request in requests:
            self.model.apply(self.editor.edit([request], seed=seed_for("contract", request.request_id)))
            digests.append(self.model.weights_digest())
        return digests

    def log_prob(self, request: EditRequest) -> float:
        return self.model.score([request.full_prompt], [" " + request.target_new])[0].log_prob


BenchFor = Callable[..., Bench]


@pytest.fixture(scope="session")
def bench_for(compose_config: Callable[..., DictConfig], cache_dir: Path) -> BenchFor:
    models: dict[str, LanguageModel] = {}
    methods: dict[tuple[str, ...], EditMethod] = {}  # frozen; a trained one keeps the rows that it read

    def make(method_name: str, model_name: str, *overrides: str) -> Bench:
        made = (method_name, model_name, *overrides)
        if made not in methods:
            config = compose_config(f"method={method_name}", f"model={model_name}", "corpus.tokens=2000", *overrides)
            if model_name not in models:
                models[model_name] = build(config.model, "model", ModelSource).load()
            methods[made] = build(config.method, "method", EditMethod)
        model, method = EditedModel(models[model_name]), methods[made]
        method.check(models[model_name].description)
        cache = Cache(cache_dir)
        return Bench(model, method, method.prepare(model, cache, SilentProgress()), cache)

    return make


def models_of(method: str) -> Sequence[str]:
    """Every architecture for methods that locate a site by architecture, three that differ in kind for the others."""
    target = get_class(OmegaConf.load(CONF / "method" / f"{method}.yaml")._target_)
    return MODELS if issubclass(target, LocateSettings) else CORE_MODELS


PAIRS = [(method, model) for method in METHODS for model in models_of(method)]
# What a method's own settings make of it, and the controls on architectures of the other methods: for the claims that matter to them.
VARIANTS = [
    ("rome", "tiny-llama", "method.key=consistent"),
    ("rome", "tiny-neox", "method.key=prompt"),
    ("pmet", "tiny-qwen3", "method.edit=both"),
    ("random", "tiny-gemma2"),
    ("none", "tiny-phi3"),
]
with_variants = pytest.mark.parametrize("bench", [*PAIRS, *VARIANTS], indirect=True, ids="-".join)


@pytest.fixture(params=PAIRS, ids="-".join)
def bench(request: pytest.FixtureRequest, bench_for: BenchFor) -> Iterator[Bench]:
    bench = bench_for(*request.param)
    yield bench
    bench.model.restore()  # the module is shared: the next method's edits would take these for the unedited model


@pytest.fixture
def writes(request: pytest.FixtureRequest) -> bool:
    """Whether the method under test is meant to write facts."""
    return cast(pytest.FixtureRequest, request).node.callspec.params["bench"][0] not in CONTROLS


def weights(model: EditedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.lm.module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_01_computing_an_edit_leaves_weights_and_random_state_as_found(bench: Bench) -> None:
    before, random_state = weights(bench.model), torch.get_rng_state()
    bench.editor.edit([REQUESTS[0]], seed=1)
    assert same(before, weights(bench.model))
    assert torch.equal(random_state, torch.get_rng_state())


@with_variants
def test_02_each_applied_edit_raises_its_target_and_changes_weights_or_adapter(
    bench: Bench, writes: bool, request: pytest.FixtureRequest
) -> None:
    """By a quarter of a nat at least; over five seeds of each model the least that any method reached is half a nat (PMET, Gemma-2)."""
    gains = []
    for fact in DIRECT:
        before, digest = bench.log_prob(fact), bench.model.weights_digest()
        bench.edit(fact)
        gains.append(bench.log_prob(fact) - before)
        assert (bench.model.weights_digest() != digest) == writes
    if request.node.callspec.params["bench"][0] in NOISE:
        assert all(gain != 0 for gain in gains)
    elif isinstance(bench.model.adapter, RequestAdapter):
        # Facts written as text: of these a random model makes what chance has it. tests/methods has a model that reads, and asks more.
        assert all(abs(gain) > 1e-3 for gain in gains)
    elif writes:
        assert min(gains) > 0.25
    else:
        assert gains == [0.0] * len(gains)


@with_variants
def test_03_a_recorded_edit_equals_the_live_one_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    edits = []
    for request in REQUESTS:
        edit = bench.editor.edit([request], seed=2)
        edits.append(edit)
        bench.model.apply(edit)
    live, digest = weights(bench.model), bench.model.weights_digest()
    with EditJournal.open(tmp_path / "journal", genesis=GENESIS) as journal:
        for request, edit in zip(REQUESTS, edits, strict=True):
            journal.append((request.request_id,), edit, 0.5)
    bench.model.restore()
    with EditJournal.open(tmp_path / "journal", genesis=GENESIS) as journal:
        for entry in journal.entries(0, len(journal)):
            bench.model.apply(entry.edit)
    assert same(live, weights(bench.model))
    assert bench.model.weights_digest() == digest


def test_04_some_edits_then_more_after_a_resume_equal_all_at_once(bench: Bench, tmp_path: Path) -> None:
    unbroken = bench.edit(*REQUESTS)
    bench.model.restore()
    with EditJournal.open(tmp_path / "journal", genesis=GENESIS) as journal:
        for request in REQUESTS[:2]:
            edit = bench.editor.edit([request], seed=seed_for("contract", request.request_id))
            bench.model.apply(journal.append((request.request_id,), edit, 0.0).edit)
    bench.model.restore()
    bench.editor = bench.method.prepare(bench.model, bench.cache, SilentProgress())  # as a new process: what the old one kept is gone
    with EditJournal.open(tmp_path / "journal", genesis=GENESIS) as journal:
        for entry in journal.entries(0, 2):
            bench.model.apply(entry.edit)
    assert bench.edit(REQUESTS[2])[-1] == unbroken[-1]


def test_05_measuring_between_edits_changes_nothing(bench: Bench) -> None:
    plain = bench.edit(*REQUESTS)
    bench.model.restore()
    digests = []
    for request in REQUESTS:
        digests += bench.edit(request)
        bench.model.score([request.full_prompt], [" " + request.target_new])
        bench.model.generate([request.full_prompt], max_new_tokens=3)
    assert digests == plain


def test_06_another_trajectory_in_the_same_process_changes_nothing(bench: Bench) -> None:
    first = bench.edit(*REQUESTS)
    bench.model.restore()
    bench.edit(replace(REQUESTS[1], request_id="other", target_new="Brazil"))
    bench.model.restore()
    assert bench.edit(*REQUESTS) == first


def test_07_restore_is_exact(bench: Bench) -> None:
    before, digest, log_prob = weights(bench.model), bench.model.weights_digest(), bench.log_prob(REQUESTS[0])
    bench.edit(*REQUESTS)
    bench.model.restore()
    assert same(before, weights(bench.model))
    assert bench.model.num_applied == 0
    assert (bench.model.weights_digest(), bench.log_prob(REQUESTS[0])) == (digest, log_prob)


def test_08_a_request_that_cannot_be_edited_is_named(bench: Bench, writes: bool) -> None:
    if not writes:
        return  # a control writes nothing, so no request can fail it
    too_long = replace(REQUESTS[0], request_id="too-long", prompt="word " * 4000 + "{} is")
    with pytest.raises(EditError, match="too-long"):
        bench.editor.edit([too_long], seed=0)


def test_09_the_harness_sees_the_edit(bench: Bench, writes: bool) -> None:
    from lm_eval.api.instance import Instance

    from editeval.benchmarks.lm_harness import harness_model

    def ask() -> float:
        pair = (REQUESTS[1].full_prompt, " " + REQUESTS[1].target_new)
        instance = Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        return float(harness_model(bench.model).loglikelihood([instance])[0][0])

    before = ask()
    bench.edit(REQUESTS[1])
    assert (ask() != before) == writes


@contextmanager
def padded_otherwise(tokenizer: PreTrainedTokenizerFast, *, pad_token_id: int) -> Iterator[None]:
    """Within the context the tokenizer pads on the left, with this token."""
    side, pad_token = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side, tokenizer.pad_token_id = "left", pad_token_id
    yield
    tokenizer.padding_side, tokenizer.pad_token = side, pad_token


def test_10_padding_batch_size_and_neighbours_do_not_change_a_score(bench: Bench) -> None:
    bench.edit(*REQUESTS)
    edited = REQUESTS[0].full_prompt
    contexts = [request.full_prompt for request in REQUESTS] + ["Yes", "A much longer context that has nothing to do with the others, but"]
    continuations = [" " + request.target_new for request in REQUESTS] + [" no", " so"]
    # An edited prompt with a second answer, within a longer prompt, within a continuation, and cut short.
    contexts += [edited, f"{edited} not only English, it is", edited[:-3], edited.rpartition(" ")[0]]
    continuations += [" French", " Greek", " is English", " was"]
    tokenizer = bench.model.lm.tokenizer
    with padded_otherwise(tokenizer, pad_token_id=tokenizer(edited)["input_ids"][-1]):  # a word of what is asked
        together = bench.model.score(contexts, continuations)
        texts = bench.model.generate(contexts, max_new_tokens=4)
    for context, continuation, score, text in zip(contexts, continuations, together, texts, strict=True):
        assert bench.model.score([context], [continuation])[0].log_prob == pytest.approx(score.log_prob, abs=1e-4)
        assert bench.model.generate([context], max_new_tokens=4) == [text]


def test_11_the_first_edit_is_still_measured_after_the_last(bench: Bench, writes: bool) -> None:
    from editeval.benchmarks.edit_quality import EditQuality

    before = bench.log_prob(REQUESTS[0])
    bench.edit(*REQUESTS)
    assert (bench.log_prob(REQUESTS[0]) != before) == writes
    context = EvaluationContext(num_edits=len(REQUESTS), edited=REQUESTS, planned=REQUESTS, seed=0, cache=bench.cache)
    evaluation = EditQuality(max_new_tokens=4, fluency_tokens=1, fluency_facts=0).evaluate(bench.model, context)
    assert {sample["request_id"] for sample in evaluation.samples} == {request.request_id for request in REQUESTS}


@pytest.mark.parametrize("method", METHODS)
def test_12_an_edit_takes_the_predicted_bytes_of_the_journal(method: str, bench_for: BenchFor) -> None:
    """On one model: shapes differ between architectures, formulas do not. Whole matrices are predicted to the byte but for a tenth.

    Where steps are recorded all of them are predicted, and fewer are made where a loss gets small (`test_fine_tuning` has the other bound).
    """
    bench = bench_for(method, "tiny-llama")
    assert isinstance(bench.method, Predictable)
    predicted = bench.method.footprint(bench.model.lm.description, Workload(element_bytes=4, batch_size=1))
    assert isinstance(predicted, Footprint)
    edits = []
    for request in REQUESTS[:2]:
        edits.append(bench.editor.edit([request], seed=seed_for("contract", request.request_id)))
        bench.model.apply(edits[-1])
    bench.model.restore()
    first, second = (encode(edit) for edit in edits)
    # A layout is recorded once for all edits that have it.
    recorded = sum(part.nbytes for part in second.tensors) + (len(second.layout) if second.layout != first.layout else 0)
    margin = 1.1 if any(isinstance(delta, DenseDelta) for delta in edits[1].deltas) else 2
    assert recorded <= predicted.journal_bytes * margin
    if not any(isinstance(delta, TunedDelta) for delta in edits[1].deltas):
        assert recorded >= predicted.journal_bytes / margin
