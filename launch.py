"""Edit a language model and measure what that costs: `python launch.py [group=option] [key=value] [-m]`.

Only hydra is imported at the top, so that `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    """Run one trajectory: compose, check, edit, measure, report; or with prepare_only what comes before it."""
    from editeval.experiment import prepare, run
    from editeval.sweep.watch import watching
    from editeval.types import EditevalError

    try:
        with watching(Path(config.paths.runs), HydraConfig.get().overrides.task) as watch:
            if config.prepare_only:
                prepare(config)
            else:
                run(config, watch)
    except EditevalError as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # the other jobs of the sweep still run; hydra reports this one at the end
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
