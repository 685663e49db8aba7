"""A model spread over two devices is edited, measured and restored as one on a single device.

The second device is a stand-in on the CPU (`tests/devices.py`): an operation over tensors of both fails as it does between GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from editeval.build import build
from editeval.edits.delta import LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.models.tiny import TinyModel
from editeval.types import EditRequest, SilentProgress
from tests.devices import SECOND, Elsewhere, spread, two_devices

REPOSITORY = Path(__file__).resolve().parents[2]
REQUEST = EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
SETTINGS = ["corpus.tokens=3000", "method.num_steps=4", "method.prefix_lengths=[[3,5]]"]
METHODS = {
    "rome-below-the-border": ["method=rome", "method.layer=1"],
    "rome-above-the-border": ["method=rome", "method.layer=2"],
    "memit": ["method=memit", "method.layers=[1,2]"],
    "alphaedit": ["method=alphaedit", "method.layers=[1,2]"],
    "pmet": ["method=pmet", "method.edit=both", "method.layers=[1,2]"],
    "emmet": ["method=emmet", "method.layers=[1,2]"],
}
CASES = [*((architecture, name) for architecture in ("gpt2", "llama") for name in METHODS), ("gpt_neox", "rome-above-the-border")]
BORDER = 2  # of four layers, the first on the second device


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, cache_dir: Path) -> tuple[EditedModel, EditedModel]:
    """Return the same model on one device and on two."""
    source = TinyModel(name="tiny", architecture=request.param, cache_dir=cache_dir, device="cpu")
    one, two = source.load(), source.load()
    layers = [two.sites.layers.format(layer) for layer in range(BORDER, two.description.num_layers)]
    spread(two.module, [*layers, two.sites.final_norm], head=two.sites.head)
    return EditedModel(one), EditedModel(two)


@contextmanager
def restored(one: EditedModel, two: EditedModel) -> Iterator[None]:
    yield
    one.restore()
    with two_devices():
        two.restore()
        assert two.weights_digest() == one.weights_digest()


def test_the_stand_in_refuses_to_mix_devices() -> None:
    with two_devices():
        there = torch.ones(2, device=SECOND)
        assert isinstance(there, Elsewhere)
        assert torch.equal((there + 1).to("cpu"), torch.full((2,), 2.0))
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2)


@pytest.mark.parametrize(("models", "name"), CASES, indirect=["models"])
def test_edits_digests_and_scores_equal_those_of_one_device(
    models: tuple[EditedModel, EditedModel], compose_config: Callable[..., DictConfig], tmp_path: Path, name: str
) -> None:
    one, two = models
    method = build(compose_config(*METHODS[name], "model=tiny-gpt2", *SETTINGS).method, "method", EditMethod)
    with restored(one, two):
        expected = method.prepare(one, Cache(tmp_path / "one"), SilentProgress()).edit([REQUEST], seed=0)
        one.apply(expected)
        with two_devices():
            edit = method.prepare(two, Cache(tmp_path / "two"), SilentProgress()).edit([REQUEST], seed=0)
            two.apply(expected)  # the recorded edit: the state is then the same bits
            assert two.weights_digest() == one.weights_digest()
            scores = two.score([REQUEST.full_prompt], [" English"])
            texts = two.generate([REQUEST.full_prompt], max_new_tokens=5)
        for ours, theirs in zip(edit.deltas, expected.deltas, strict=True):
            assert isinstance(ours, LowRankDelta)
            assert isinstance(theirs, LowRankDelta)
            assert not isinstance(ours.left, Elsewhere)  # what is recorded lies on the CPU
            expected_dw = theirs.left @ theirs.right
            # Other kernels run for the second device: sums of keys differ in their last digit, and C^-1 makes more of it.
            assert float((ours.left @ ours.right - expected_dw).norm()) < 2e-3 * float(expected_dw.norm())
        assert scores[0].log_prob == pytest.approx(one.score([REQUEST.full_prompt], [" English"])[0].log_prob, abs=1e-4)
        assert texts == one.generate([REQUEST.full_prompt], max_new_tokens=5)


def test_no_device_is_named_by_its_number() -> None:
    rooms = ("editeval", "hydra_plugins", "benchmarks", "conf")
    files = [path for room in rooms for path in (REPOSITORY / room).rglob("*") if path.suffix in (".py", ".yaml")]
    files.append(REPOSITORY / "launch.py")
    assert any("hydra_plugins" in path.parts for path in files)
    assert len(files) > 100
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "cuda:" not in text, path
        assert "cuda(0" not in text, path
