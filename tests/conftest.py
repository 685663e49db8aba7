"""What tests share: the composed config, tiny models, a cache of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share the cores by process; set before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network; set before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole session, so that a tiny tokenizer or covariance is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def compose_config(cache_dir: Path) -> Iterator[Compose]:
    """Compose `conf/config.yaml` with overrides, as the command line does."""

    def composed(*overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            return compose("config", overrides=[f"paths.cache={cache_dir}", *overrides])

    yield composed
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real rows that may lie beside the checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real rows at {folder}")
    return folder
