"""The harness's three kinds of request, answered by our engine; `lm_harness.harness_model` makes an `LM` of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from editeval.inference.edited import EditedModel
from editeval.inference.endings import NO_EARLY_STOPS, EarlyStops
from editeval.types import ConfigError, Progress

# The names that a task may use for its bound; the first that is set counts.
LENGTH_BOUNDS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_MAX_NEW_TOKENS = 256  # what the harness's own Hugging Face engine allows a task that sets no bound
REQUESTS_PER_CALL = 1024  # paces the progress display; fixed, so that batches are the same at every rung


class HarnessRequests:
    """Answers requests (`lm_eval.api.instance.Instance`) by the conventions of the harness's Hugging Face engine, `HFLM`."""

    def __init__(self, model: EditedModel, *, progress: Progress, description: str, early: EarlyStops = NO_EARLY_STOPS) -> None:
        super().__init__()
        self._model = model
        self._progress = progress
        self._description = description
        self._early = early

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (natural log-probability, whether greedy decoding writes it) of each (context, continuation)."""
        answers: list[tuple[float, bool]] = []
        for chunk in self._chunks(requests, REQUESTS_PER_CALL):
            scores = self._model.score([request.args[0] for request in chunk], [request.args[1] for request in chunk])
            answers.extend((score.log_prob, score.is_greedy) for score in scores)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the natural log-probability of each whole text."""
        answers: list[float] = []
        for chunk in self._chunks(requests, REQUESTS_PER_CALL):
            answers.extend(score.log_prob for score in self._model.score_text([request.args[0] for request in chunk]))
        return answers

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue each context greedily until one of its stop strings, or an early stop of the benchmark."""
        texts: dict[int, str] = {}
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(generation_settings(request.args[1]), []).append(index)
        for (max_new_tokens, stop), indices in groups.items():
            for chunk in self._chunks(indices, REQUESTS_PER_CALL):
                contexts = [requests[index].args[0] for index in chunk]
                generated = self._model.generate(contexts, max_new_tokens=max_new_tokens, stop=stop, early=self._early)
                texts.update(zip(chunk, generated, strict=True))
        return [texts[index] for index in range(len(requests))]

    def _chunks(self, requests: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
        chunks = [requests[start : start + size] for start in range(0, len(requests), size)]
        return self._progress.track(chunks, description=self._description, total=len(chunks))


def generation_settings(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Return (max_new_tokens, stop strings) of a task's `generation_kwargs`.

    Raises:
        ConfigError: the task samples; a score that changes from call to call cannot be compared along a trajectory.
    """
    if settings.get("do_sample") or settings.get("temperature"):
        raise ConfigError(
            f"generation_kwargs={dict(settings)} samples; only greedy generation is measured: set do_sample: false, temperature: 0"
        )
    until = settings.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    bound = next((settings[name] for name in LENGTH_BOUNDS if settings.get(name) is not None), DEFAULT_MAX_NEW_TOKENS)
    return int(bound), tuple(text for text in stop if text)
