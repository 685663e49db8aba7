"""Token perplexity of a text: the first number to move when a model is damaged, and one that needs no answers.

Bits a token and perplexity depend on the tokenizer, so they compare states of one model; bits a byte compare models too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from editeval.benchmarks.estimates import mean_and_stderr
from editeval.inference.edited import EditedModel
from editeval.interfaces import EvaluationContext
from editeval.types import ConfigError, DatasetError, Evaluation, Measurement

VERSION = "3"  # raised whenever the same model and text would give other numbers
TOKENS_PER_SAMPLE = 64
BUILT_IN_TEXT = Path(__file__).parent / "data" / "quick" / "passage.txt"


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a UTF-8 text file (None: the passage that comes with the package), scored in windows of the model's length.

    Only the first `max_characters` are read; None for all of them.
    """

    text_file: str | None
    max_characters: int | None

    def __post_init__(self) -> None:
        if self.max_characters is not None and self.max_characters < 1:
            raise ConfigError(f"max_characters={self.max_characters} must be at least 1, or null for the whole text")

    @property
    def depends_on_requests(self) -> bool:
        """False: the text is the same whatever was edited."""
        return False

    def check(self) -> None:
        """Read the text.

        Raises:
            DatasetError: no such file, not UTF-8, or nothing in it.
        """
        _ = self._text

    def settings(self) -> Mapping[str, Any]:
        """Return the text's hash."""
        return {"benchmark": "perplexity", "version": VERSION, "text": hashlib.sha256(self._text.encode()).hexdigest()}

    def evaluate(self, model: EditedModel, context: EvaluationContext) -> Evaluation:
        """Score every token of the text. The standard error takes tokens for independent, so it is a lower bound."""
        # A start token that the tokenizer adds is none of the text: scored too, it would count against the models that have one.
        token_log_probs = model.score_text([self._text], special_tokens=False)[0].token_log_probs
        bits = [-log_prob / math.log(2) for log_prob in token_log_probs]
        mean, stderr = mean_and_stderr(bits)
        values = {
            "bits_per_token": (mean, stderr),
            # d(2^b)/db = ln(2) 2^b carries the error of the bits over.
            "perplexity": (_power_of_two(mean), None if stderr is None else stderr * math.log(2) * _power_of_two(mean)),
            "bits_per_byte": (math.fsum(bits) / len(self._text.encode()), None),
        }
        return Evaluation(
            measurements=tuple(
                Measurement(
                    task=self._name,
                    metric=metric,
                    protocol="likelihood",
                    value=value,
                    n=len(bits),
                    stderr=error,
                    higher_is_better=False,
                    version=VERSION,
                )
                for metric, (value, error) in values.items()
            ),
            samples=tuple(
                {"task": self._name, "item": start // TOKENS_PER_SAMPLE, "tokens": len(block), "bits": math.fsum(block)}
                for start in range(0, len(bits), TOKENS_PER_SAMPLE)
                for block in (bits[start : start + TOKENS_PER_SAMPLE],)
            ),
        )

    @property
    def _path(self) -> Path:
        return BUILT_IN_TEXT if self.text_file is None else Path(self.text_file)

    @property
    def _name(self) -> str:
        return self._path.stem

    @cached_property
    def _text(self) -> str:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"cannot read the text {self._path} ({error}); set text_file to a UTF-8 file") from error
        if not text.strip():
            raise DatasetError(f"the text {self._path} is empty; set text_file to a text of some pages")
        return text[: self.max_characters]


def _power_of_two(bits: float) -> float:
    """Return 2^bits; a collapsed model's is infinite rather than an error."""
    try:
        return math.pow(2.0, bits)
    except OverflowError:
        return math.inf
