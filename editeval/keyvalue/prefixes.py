"""Context prefixes: short texts before a prompt, so that a key and a value hold in more than one context.

The unedited model writes them, from a few opening words, sampling with a generator of its own (ROME, appendix E.5: lengths
and opening words as in the published code).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editeval.files import Cache
from editeval.keyvalue.lookup import BARE, leading_special_ids
from editeval.keyvalue.suffix import next_token_logits, pad_rows
from editeval.models.model import LanguageModel
from editeval.models.trace import capture
from editeval.types import ConfigError, content_key, seed_for

OPENINGS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


def check_prefixes(contexts: Sequence[str]) -> None:
    """Check prefixes that were given literally.

    Raises:
        ConfigError: one that is no text with exactly one "{}", or none that is the bare "{}" and comes first.
    """
    if isinstance(contexts, str):
        raise ConfigError(f"method.context_prefixes={contexts!r} must be a list of texts, the first of them the bare '{{}}'")
    for context in contexts:
        if not isinstance(context, str) or context.count(BARE) != 1:
            raise ConfigError(f"context prefix {context!r} must be a text that holds '{{}}' exactly once; correct method.context_prefixes")
    if not contexts or contexts[0] != BARE:
        raise ConfigError(f"the first context prefix must be the bare '{{}}', got {list(contexts)[:1]}; correct method.context_prefixes")


def check_lengths(lengths: Sequence[Sequence[int]]) -> None:
    """Check what prefixes are to be generated.

    Raises:
        ConfigError: no list of pairs of positive whole numbers.
    """
    pairs = lengths if isinstance(lengths, (list, tuple)) else [lengths]
    for pair in pairs:
        numbers = pair if isinstance(pair, (list, tuple)) else ()
        if len(numbers) != 2 or not all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers):
            raise ConfigError(
                f"method.prefix_lengths={lengths!r} must be pairs (tokens, count) of whole numbers of at least 1, "
                f"such as [[5,10],[10,10]]; got {pair!r}"
            )


def context_prefixes(lm: LanguageModel, lengths: Sequence[Sequence[int]], *, seed: int, cache: Cache) -> tuple[str, ...]:
    """Return "{}" and, for each (tokens, count) of `lengths`, `count` texts of about that many tokens followed by ". {}".

    The model must be in its unedited state; the same model, lengths and seed give the same prefixes.
    """
    content = {"model": lm.fingerprint, "lengths": [list(pair) for pair in lengths], "openings": OPENINGS, "top_k": TOP_K, "seed": seed}
    generated: list[str] = cache.json("prefixes", content_key(content), lambda: _generate(lm, lengths, seed))
    return (BARE, *generated)


def _generate(lm: LanguageModel, lengths: Sequence[Sequence[int]], seed: int) -> list[str]:
    return [
        # Braces would make another placeholder.
        text.replace("{", " ").replace("}", " ") + ". {}"
        for index, (tokens, count) in enumerate(lengths)
        for text in _sample(lm, count=count, tokens=tokens, seed=seed_for("prefixes", seed, index))
    ]


def _sample(lm: LanguageModel, *, count: int, tokens: int, seed: int) -> list[str]:
    """Return `count` texts of `tokens` tokens each, opening words included; the k most likely tokens are drawn from."""
    generator = torch.Generator().manual_seed(seed)
    leading = leading_special_ids(lm.tokenizer)
    openings = [lm.tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in OPENINGS]
    rows = [[*leading, *openings[number * len(OPENINGS) // count]] for number in range(count)]
    device = lm.input_device
    last_layer = lm.sites.layers.format(lm.description.num_layers - 1)
    goal = tokens + len(leading)
    while any(len(row) < goal for row in rows):
        with torch.no_grad(), capture(lm.module, [last_layer], outputs=True) as trace:
            lm.module.base_model(input_ids=pad_rows(rows, device), use_cache=False)
        hidden = trace.outputs[last_layer]
        ends = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
        with torch.no_grad():
            logits = next_token_logits(lm, hidden[torch.arange(len(rows), device=hidden.device), ends]).cpu()
        logits[:, list(lm.tokenizer.all_special_ids)] = -torch.inf
        top = logits.topk(TOP_K, dim=1)
        chosen = torch.multinomial(top.values.softmax(dim=1), 1, generator=generator)
        for row, token in zip(rows, top.indices.gather(1, chosen)[:, 0].tolist(), strict=True):
            if len(row) < goal:
                row.append(token)
    return [str(lm.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
