"""Small tokenizers of the two kinds in use, trained in a moment on prose that ships with Python.

`byte_level` is GPT-2's kind (Radford et al. 2019): bytes as letters, a space belongs to the word behind it, no start token.
`sentencepiece_like` is Llama's kind (Kudo & Richardson, arXiv 1808.06226): `▁` for spaces, one put before the text, unknown letters as
bytes, and a start token before every text.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def byte_level(*, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with `<|endoftext|>` as its only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_prose(), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",  # noqa: S106  (no password)
        eos_token="<|endoftext|>",  # noqa: S106
        unk_token="<|endoftext|>",  # noqa: S106
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def sentencepiece_like(*, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer with byte fallback that begins every text with `<s>` and `▁`."""
    specials = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces, merges = _trained_pieces(vocab_size - len(specials) - len(fallback))
    vocabulary = {piece: index for index, piece in enumerate([*specials, *fallback, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        add_bos_token=True,
    )


def _trained_pieces(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Return pieces in the order of their ids, and the merges that make them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.train_from_iterator(_prose(), trainers.BpeTrainer(vocab_size=count, show_progress=False))
    trained: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in trained["merges"]]


def _prose() -> list[str]:
    """Return about 700 kB of English: the topics of Python's own help, the one text that every installation has."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
