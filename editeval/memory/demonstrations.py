"""Examples of how an edited fact is to be used, out of other facts (IKE, arXiv:2305.12740, section 3.2).

An example states a fact and asks a prompt after it. Three kinds: `copy` asks the fact's own prompt, `update` a paraphrase of it (both are
answered as the fact says), `retain` a prompt about another subject (answered as before). The facts that examples are made of are those of
a pool that are nearest in meaning to the fact at hand; the nearest stands last, right before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from editeval.files import Cache, write_atomic
from editeval.memory.encoder import SentenceEncoder, encoder_key
from editeval.models.model import LanguageModel
from editeval.types import EditError, EditRequest, Progress, content_key, seed_for

KINDS = ("copy", "update", "retain")


@dataclass(frozen=True, kw_only=True, eq=False)
class DemonstrationPool:
    """Facts that examples are made of, with the embeddings (P, D) of their statements."""

    rows: tuple[EditRequest, ...]
    embeddings: Tensor

    def examples(self, statement: Tensor, *, count: int, ratio: Sequence[int]) -> tuple[str, ...]:
        """Return at most `count` examples for a fact by its statement's embedding (D), of the kinds of `KINDS` in this ratio.

        From the nearest row on each gives one example, of the kind that is furthest behind its share among those that the row can give
        (not every row has a paraphrase or a neighbour). There are fewer examples only where the pool is used up.
        """
        nearest = (self.embeddings.double() @ statement.double()).argsort(descending=True, stable=True)
        given = dict.fromkeys(KINDS, 0)
        shares = dict(zip(KINDS, ratio, strict=True))
        examples: list[str] = []
        for number in nearest.tolist():
            if len(examples) == count:
                break
            possible = {kind: text for kind, text in _examples(self.rows[number]).items() if shares[kind]}
            if possible:
                kind = min(possible, key=lambda name: (given[name] + 1) / shares[name])
                given[kind] += 1
                examples.append(possible[kind])
        return tuple(reversed(examples))


def pool_of(rows: Sequence[EditRequest], encoder: SentenceEncoder, cache: Cache, progress: Progress) -> DemonstrationPool:
    """Return the pool of these rows; its embeddings come from the cache, or are computed and put there."""
    texts = [statement_of(row) for row in rows]
    path = cache.path("demonstrations", content_key({"encoder": encoder_key(encoder), "texts": texts}), ".safetensors")
    if not path.exists():
        embedded = [encoder.encode([text])[0] for text in progress.track(texts, description="demonstrations", total=len(texts))]
        write_atomic(path, save({"embeddings": torch.stack(embedded)}))
    return DemonstrationPool(rows=tuple(rows), embeddings=load_file(path)["embeddings"])


def statement_of(request: EditRequest) -> str:
    """Return a request's fact as a sentence."""
    return f"{request.full_prompt.rstrip()} {request.target_new}"


def statement_that_fits(lm: LanguageModel, request: EditRequest) -> str:
    """Return a request's fact as a sentence, after a look at whether a model has room for it and for the question about it.

    Raises:
        EditError: it has not.
    """
    statement = statement_of(request)
    size, most = len(lm.tokenizer(question(statement) + statement)["input_ids"]), lm.description.max_positions
    if size > most:
        raise EditError(
            f"the fact before its own prompt has {size} tokens, {lm.description.name} takes at most {most}; shorten the prompt",
            request_ids=[request.request_id],
        )
    return statement


def example(statement: str, prompt: str, answer: str) -> str:
    """Return a fact with a prompt after it, and the answer."""
    return f"{question(statement)}{prompt.rstrip()} {answer}\n\n"


def question(statement: str) -> str:
    """Return a fact, and the place for a prompt after it."""
    return f"New Fact: {statement}\nPrompt: "


def _examples(row: EditRequest) -> Mapping[str, str]:
    """Return the examples that a row can give, by kind; of several paraphrases or neighbours always the same one."""
    fact = statement_of(row)
    examples = {"copy": example(fact, row.full_prompt, row.target_new)}
    if row.paraphrase_prompts:
        chosen = row.paraphrase_prompts[seed_for("update", row.request_id) % len(row.paraphrase_prompts)]
        examples["update"] = example(fact, chosen, row.target_new)
    if row.neighborhood_prompts:
        probe = row.neighborhood_prompts[seed_for("retain", row.request_id) % len(row.neighborhood_prompts)]
        examples["retain"] = example(fact, probe.prompt, probe.answer)
    return examples
