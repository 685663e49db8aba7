"""What hypernetworks are predicted to take is what they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from editeval.build import build
from editeval.interfaces import EditMethod, ModelSource, Predictable
from editeval.keyvalue.footprint import all_mlp_maps
from editeval.training.footprint_training import network_parameters
from editeval.training.hypernetwork import Hypernetwork
from editeval.training.hypernetwork_settings import edited_maps
from editeval.types import Workload


@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama", "tiny-phi3"])
def test_a_network_has_the_predicted_parameters(compose_config: Callable[..., DictConfig], model: str) -> None:
    lm = build(compose_config(f"model={model}").model, "model", ModelSource).load()
    network = Hypernetwork(edited_maps(lm, (1, 2)), rank=8, rate=1.0, seed=0)
    made = sum(parameter.numel() for name, parameter in network.named_parameters() if not name.startswith("rates."))
    assert network_parameters(all_mlp_maps(lm.description) * 2, rank=8) == made


@pytest.mark.parametrize("method", ["mend", "rledit"])
def test_a_trained_network_that_is_given_costs_no_training(compose_config: Callable[..., DictConfig], method: str, tmp_path: Path) -> None:
    found = []
    for override in ("method.archive=null", f"method.archive={tmp_path}/network.safetensors"):
        config = compose_config(f"method={method}", "model=tiny-llama", override)
        built, model = build(config.method, "method", EditMethod), build(config.model, "model", ModelSource).describe()
        assert isinstance(built, Predictable)
        predicted = built.footprint(model, Workload(element_bytes=4, batch_size=1))
        assert predicted is not None
        found.append(predicted)
    trained, given = found
    assert trained.once_operations > 0 < trained.disk_bytes
    assert given.once_operations == given.disk_bytes == 0
    assert given.journal_bytes == trained.journal_bytes
    assert max(given.peak_bytes.values()) < max(trained.peak_bytes.values())
