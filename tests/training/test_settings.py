"""How training is set: the keys that trained parts are kept by stay, and numbers that cannot be are refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from editeval.training.settings import LearningSettings, NetworkLearningSettings
from editeval.types import ConfigError, content_key

# SERAC's and MEND's settings of tiny-gpt2, with the keys that commit fe951e7 made of them, where each had a class of its own; MEND's anew
# since `v_std`.
SERAC = LearningSettings(
    learning_rate=0.001, gradient_clip=100.0, max_steps=20, rows_per_step=4, validate_every=10, patience=20, held_back=0.05, seed=0
)
SERAC_KEY = "47ff699fdf44fcfdecb07d9bad691abb082bc425769e5a039345b9299a20311e"
MEND = NetworkLearningSettings(
    rank=16,
    v_std=None,
    edit_learning_rate=0.001,
    learning_rate=0.001,
    rate_learning_rate=0.001,
    edit_weight=0.1,
    locality_weight=1.0,
    gradient_clip=100.0,
    max_steps=10,
    rows_per_step=2,
    validate_every=10,
    patience=10,
    held_back=0.03,
    seed=0,
)
MEND_KEY = "581b2ddd1737191d71492d37cd40911a800fb9eabcdf2cae87dc5e83693354c7"


@pytest.mark.parametrize(("settings", "key"), [(SERAC, SERAC_KEY), (MEND, MEND_KEY)], ids=["serac", "mend"])
def test_trained_parts_are_found_under_the_keys_they_were_kept_by(settings: LearningSettings, key: str) -> None:
    assert content_key(dict(settings.as_key())) == key
    assert content_key(dict(replace(settings, anneal=True).as_key())) != key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("max_steps", 0),
        ("patience", 0),
        ("learning_rate", 0.0),
        ("edit_weight", -1.0),
        ("locality_weight", -0.1),
        ("held_back", 1.0),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_its_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{name}={value} must"):
        replace(MEND, **{name: value})  # type: ignore[arg-type]


def test_settings_are_read_without_lightning() -> None:
    modules = "editeval.training.footprint_training, editeval.training.hypernetwork_settings, editeval.training.settings"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('lightning' in sys.modules)"], check=True)
