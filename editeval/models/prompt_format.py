"""How a prompt is put to a model: as it is, as a question, or in the words of the model's chat template.

| format | what the model reads                                                                       |
|--------|--------------------------------------------------------------------------------------------|
| `raw`  | the prompt                                                                                 |
| `qa`   | `Question: <prompt>` and, on the next line, `Answer:`                                      |
| `chat` | the prompt as a user's turn in the tokenizer's chat template, the assistant's turn begun   |

No system turn is written (a template may add its own); where there is one, its text begins the user's first turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from editeval.types import ConfigError, EditRequest, Probe, content_key

RAW, QA, CHAT = "raw", "qa", "chat"
FORMATS = (RAW, QA, CHAT)


def check_format(prompt_format: str) -> None:
    """Raise ConfigError when there is no such format."""
    if prompt_format not in FORMATS:
        raise ConfigError(f"prompt_format={prompt_format!r}; one of {', '.join(FORMATS)}")


def check_template(tokenizer: PreTrainedTokenizerFast, *, name: str) -> None:
    """Raise ConfigError when the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model {name} has no chat template, so prompt_format=chat cannot be used; choose prompt_format=raw or qa, "
            "or a model that was trained to chat"
        )


def chat_text(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Mapping[str, str]], *, name: str, begin_answer: bool = True) -> str:
    """Return a conversation as text, ready for the tokenizer; without `begin_answer` the last turn stays open.

    A beginning-of-sequence token that the template writes is left out where the tokenizer adds its own.

    Raises:
        ConfigError: no chat template, or one that refuses these turns.
    """
    check_template(tokenizer, name=name)
    try:
        text = tokenizer.apply_chat_template(
            _without_system(turns), tokenize=False, add_generation_prompt=begin_answer, continue_final_message=not begin_answer
        )
    except (TemplateError, ValueError) as error:
        raise ConfigError(f"the chat template of model {name} refuses the prompt: {error}; choose prompt_format=raw or qa") from error
    start = tokenizer.bos_token
    if isinstance(start, str) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return str(text).removeprefix(start)
    return str(text)


def wrapper(prompt_format: str, tokenizer: PreTrainedTokenizerFast | None, *, name: str) -> Callable[[str], str]:
    """Return the function from a prompt to what the model reads.

    Raises:
        ConfigError: an unknown format, or `chat` without a chat template.
    """
    check_format(prompt_format)
    if prompt_format == RAW:
        return str
    if prompt_format == QA:
        return lambda prompt: f"Question: {prompt}\nAnswer:"
    assert tokenizer is not None
    check_template(tokenizer, name=name)
    return lambda prompt: chat_text(tokenizer, [{"role": "user", "content": prompt}], name=name)


def in_format(request: EditRequest, wrap: Callable[[str], str]) -> EditRequest:
    """Return the fact with each of its prompts in another format; its source hash becomes that of both."""

    def wrapped(probes: Sequence[Probe]) -> tuple[Probe, ...]:
        return tuple(replace(probe, prompt=wrap(probe.prompt)) for probe in probes)

    return replace(
        request,
        prompt=wrap(request.prompt),
        paraphrase_prompts=tuple(map(wrap, request.paraphrase_prompts)),
        neighborhood_prompts=wrapped(request.neighborhood_prompts),
        portability=wrapped(request.portability),
        source_hash=content_key([request.source_hash or content_key(request), wrap("{}")]),
    )


def _without_system(turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the turns with the text of a leading system turn at the head of the next one."""
    copied = [dict(turn) for turn in turns]
    if len(copied) > 1 and copied[0]["role"] == "system":
        system, first, *rest = copied
        return [first | {"content": f"{system['content'].rstrip()}\n\n{first['content']}"}, *rest]
    return copied
