"""What memories of facts are predicted to take is what they take."""

from __future__ import annotations

import pytest
import torch

from editeval.edits.delta import Edit
from editeval.edits.encoding import encode
from editeval.memory.encoder import HASHED, HashedEncoder
from editeval.memory.facts import Fact, memory_delta
from editeval.memory.footprint import encoder_shape, fact_bytes, parameters_of, reader_shape
from editeval.models.load import description_of
from editeval.models.shapes import published_config, weight_bytes
from editeval.types import Workload


def test_the_hashed_encoder_has_the_predicted_shape() -> None:
    encoder = HashedEncoder()
    shape = encoder_shape(HASHED)
    assert (shape.parameters, shape.width) == (sum(parameter.numel() for parameter in encoder.parameters()), encoder.width)


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-2-7b-hf", "openai-community/gpt2-xl", "mistralai/Mistral-7B-v0.1", "builtin:smollm2-135m"]
)
def test_a_copy_of_a_model_has_about_the_predicted_parameters(name: str) -> None:
    """Shared heads and an embedding that is not tied are not in a description; they are an eighth at most."""
    config = published_config(name)
    assert config is not None
    assert parameters_of(description_of(name, config)) == pytest.approx(weight_bytes(config, element_bytes=1), rel=0.125)


def test_a_named_counterfactual_model_counts_like_llama_160m() -> None:
    config = published_config("meta-llama/Llama-2-7b-hf")
    assert config is not None
    model = description_of("llama2-7b", config)
    assert parameters_of(reader_shape("JackFram/llama-160m", model)) == pytest.approx(162e6, rel=0.16)  # as published; untied
    assert reader_shape(None, model) == model


@pytest.mark.parametrize("shown", [0, 33])
def test_a_real_fact_takes_about_the_predicted_bytes(shown: int) -> None:
    """The first row of CounterFact, with examples made like it."""
    prompt, subject, target = "The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"
    example = f"New Fact: {prompt} {target}\nPrompt: Danielle Darrieux was a native speaker of {target}\n\n"
    fact = Fact(prompt=prompt, subject=subject, target=target, embedding=torch.zeros(64), demonstrations=(example,) * shown)
    encoded = encode(Edit(deltas=(memory_delta([fact]),)))
    recorded = len(encoded.layout) + sum(part.nbytes for part in encoded.tensors)
    predicted = fact_bytes(encoder_shape(HASHED), Workload(element_bytes=4, batch_size=1), demonstrations=shown)
    assert recorded / 1.5 < predicted < recorded * 1.5
