"""A memory of facts: what a request is about, what has no room, and what is refused."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from editeval.edits.delta import Edit, LowRankDelta
from editeval.inference.adapters import RequestAdapter, Route
from editeval.inference.edited import ANSWER_TOKENS, EditedModel
from editeval.inference.encoding import fitting_prefix
from editeval.memory.encoder import HashedEncoder
from editeval.memory.facts import Fact, MemoryAdapter, last_sentence, memory_delta
from editeval.models.tiny import TinyModel
from editeval.types import EditError
from tests.inference.conftest import cast_parameters

FRANCE = "The capital of France is"


class Prefixing(MemoryAdapter):
    """Puts the nearest fact before a request."""

    def routes(self, requests: Sequence[str]) -> Sequence[Route | None]:
        return [
            Route(prefix=f"{hits[0].fact.statement}. ", demonstrations=hits[0].fact.demonstrations) if hits else None
            for hits in self.about(requests)
        ]


def memory(*facts: Fact, count: int = 1) -> Prefixing:
    adapter = Prefixing(HashedEncoder(), similarity=0.7, count=count)
    for fact in facts:
        adapter.add([memory_delta([fact])])
    return adapter


def fact(prompt: str, target: str, *, demonstrations: tuple[str, ...] = ()) -> Fact:
    (embedding,) = HashedEncoder().encode([prompt])
    return Fact(prompt=prompt, subject="x", target=target, embedding=embedding, demonstrations=demonstrations)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    source = TinyModel(name="t", architecture="llama", cache_dir=tmp_path_factory.mktemp("cache"), max_positions=256, device="cpu")
    return EditedModel(source.load())


def test_a_request_is_about_the_fact_that_it_ends_with_whatever_stands_before_it() -> None:
    adapter = memory(fact(FRANCE, "Rome"), fact("Nokia was founded in", "Tampa"))
    assert isinstance(adapter, RequestAdapter)
    asked = ["Nokia was founded in", f"Updated on Monday in Punkeydoodle. {FRANCE}", "1 + 1 = 2\n5 + 3 =", ""]
    assert [[hit.fact.target for hit in hits] for hits in adapter.about(asked)] == [["Tampa"], ["Rome"], [], []]
    assert adapter.about([]) == []


def test_of_two_facts_with_one_prompt_the_later_one_counts() -> None:
    adapter = memory(fact(FRANCE, "Rome"), fact(FRANCE, "Oslo"), count=2)
    assert [hit.fact.target for hit in adapter.about([FRANCE])[0]] == ["Oslo"]
    adapter.add([memory_delta([fact(FRANCE, "Rome")])])  # and back again
    assert [hit.fact.target for hit in adapter.about([FRANCE])[0]] == ["Rome"]
    with pytest.raises(EditError, match="holds every fact of this edit already"):
        adapter.check([memory_delta([fact(FRANCE, "Rome")])])


def test_a_snapshot_brings_an_empty_memory_to_the_same_digest() -> None:
    full = memory(fact(FRANCE, "Rome", demonstrations=("a", "b")), fact("Nokia was founded in", "Tampa"))
    copy = memory()
    copy.add(full.snapshot())
    assert copy.digest() == full.digest() != memory().digest()
    assert copy.facts[0].demonstrations == ("a", "b")


def test_a_digest_is_the_hash_over_every_facts_own_in_order() -> None:
    """Its values are in journals and logs, so they stay whatever is kept to compute them."""
    adapter, own = memory(), list[bytes]()
    for one in (fact(FRANCE, "Rome", demonstrations=("a",)), fact("Nokia was founded in", "Tampa"), fact(FRANCE, "Oslo")):
        texts = repr((one.prompt, one.subject, one.target, one.demonstrations)).encode()
        own.append(hashlib.sha256(texts + one.embedding.numpy().tobytes()).digest())
        adapter.add([memory_delta([one])])
        assert adapter.digest() == hashlib.sha256(b"".join(own)).hexdigest()
    adapter.clear()
    assert adapter.digest() == hashlib.sha256().hexdigest()


def steps_of(call: Callable[[], object]) -> int:
    """Return how many instructions of this project's Python a call takes."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if "/editeval/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class Counted(HashedEncoder):
    """Counts how often it is asked to embed."""

    calls = 0

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        self.calls += 1
        return super().forward(texts)


def test_a_request_and_an_edit_take_the_same_steps_whatever_the_number_of_facts() -> None:
    """What grows with the facts is one product of matrices, and the search of its largest values."""
    steps, calls = list[list[int]](), list[int]()
    new = [memory_delta([fact(FRANCE, "Oslo"), fact("Spain lies in", "Africa")])]
    for size in (10, 1000):
        encoder = Counted()
        adapter = Prefixing(encoder, similarity=0.7, count=1)
        adapter.add([memory_delta([fact(f"Land{number} lies in", "Asia") for number in range(size)])])
        adapter.add([memory_delta([fact(FRANCE, "Rome")])])
        asked = partial(adapter.about, [FRANCE, "Nokia was founded in"])
        steps.append([steps_of(call) for call in (asked, partial(adapter.check, new), partial(adapter.add, new), adapter.digest)])
        calls.append(encoder.calls)
        assert [hit.fact.target for hit in adapter.about([FRANCE])[0]] == ["Oslo"]
    assert steps[0] == steps[1]
    assert min(steps[0]) > 0
    assert calls == [2, 2]


def test_what_is_no_fact_of_this_memory_is_refused_and_changes_nothing() -> None:
    adapter = memory(fact(FRANCE, "Rome"))
    before = adapter.digest()
    narrow = Fact(prompt="a", subject="x", target="b", embedding=torch.ones(3))
    with pytest.raises(EditError, match=r"choose the encoder that the edit was made with"):
        adapter.add([memory_delta([narrow])])
    with pytest.raises(EditError, match="a LowRankDelta is no fact"):
        adapter.add([LowRankDelta(parameter="w", left=torch.ones(1, 1), right=torch.ones(1, 1))])  # type: ignore[list-item]
    assert adapter.digest() == before


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("One. Two three four five is", "Two three four five is"),
        ("Who is it? It is", "Who is it? It is"),
        ("Examples.\nWhat is the capital of France?\nAnswer:", "What is the capital of France?\nAnswer:"),
        ("U.S. law", "U.S. law"),
        ("", ""),
    ],
)
def test_a_last_sentence_has_four_words_or_what_stands_before_it(text: str, end: str) -> None:
    assert last_sentence(text) == end


def test_demonstrations_give_way_first_then_the_whole_route(model: EditedModel) -> None:
    tokenizer, shown = model.lm.tokenizer, ("one one one ", "two two two ", "three three three ")
    whole = "".join(shown) + "fact "
    size = len(tokenizer(whole + "asked")["input_ids"])
    assert fitting_prefix(tokenizer, shown, "fact ", "asked", room=size) == whole
    assert fitting_prefix(tokenizer, shown, "fact ", "asked", room=size - 1) == "two two two three three three fact "
    least = len(tokenizer("fact asked")["input_ids"])
    assert fitting_prefix(tokenizer, shown, "fact ", "asked", room=least) == "fact "
    assert fitting_prefix(tokenizer, shown, "fact ", "asked", room=least - 1) == ""


def test_choices_are_scored_after_one_context_and_requests_about_nothing_as_they_are(model: EditedModel) -> None:
    other, continuations = "Yes, the weather is fine and", [" so", " no and so on and so on"]
    before = model.score([other] * 2, continuations)
    routed = EditedModel(model.lm)
    routed.attach(memory())
    examples = tuple(f"Number {number} is a number. " for number in range(40))
    routed.apply(Edit(deltas=(memory_delta([fact(FRANCE, "Rome", demonstrations=examples)]),)))
    assert routed.score([other] * 2, continuations) == before
    prefix = fitting_prefix(model.lm.tokenizer, examples, f"{FRANCE} Rome. ", FRANCE, room=256 - ANSWER_TOKENS)
    assert 0 < prefix.count("Number") < 40
    expected = model.score([prefix + FRANCE] * 2, continuations)
    assert routed.score([FRANCE] * 2, continuations) == expected
    assert routed.generate([FRANCE], max_new_tokens=3) != model.generate([FRANCE], max_new_tokens=3)
    with routed.unedited():
        assert routed.score([FRANCE], [" so"]) == model.score([FRANCE], [" so"])
    too_long = "word " * 300 + FRANCE  # no room even for the fact: asked as it is
    assert routed.score([too_long], [" so"]) == model.score([too_long], [" so"])
    assert routed.score_text([f"{FRANCE} Rome"])[0].log_prob != model.score_text([f"{FRANCE} Rome"])[0].log_prob
    assert routed.score_text([other]) == model.score_text([other])


def test_what_is_about_no_fact_is_answered_bit_for_bit_as_in_the_same_call_to_the_unedited_model_even_in_half_precision(
    tmp_path: Path,
) -> None:
    lm = TinyModel(name="t", architecture="llama", cache_dir=tmp_path, max_positions=256, device="cpu").load()
    cast_parameters(lm, torch.bfloat16)
    model = EditedModel(lm)
    model.attach(memory())
    asked = [f"Of all numbers the one that follows {number} is" for number in range(40)]
    unedited = EditedModel(lm)  # one that shares no answers with the other
    base = unedited.score([*asked, FRANCE], [" ten"] * 41), unedited.generate([*asked, FRANCE], max_new_tokens=6)
    (embedding,) = HashedEncoder().encode([FRANCE])
    model.apply(Edit(deltas=(memory_delta([Fact(prompt=FRANCE, subject="x", target="Rome", embedding=embedding)]),)))
    scores, texts = model.score([*asked, FRANCE], [" ten"] * 41), model.generate([*asked, FRANCE], max_new_tokens=6)
    assert scores[:40] == base[0][:40]
    assert texts[:40] == base[1][:40]
    assert scores[40] != base[0][40]
