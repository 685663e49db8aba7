"""Edit a language model and measure what that costs: `python launch.py [group=option] [key=value] [-m]`.

Only hydra and what puts its errors into words are imported at the top, so that `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from editeval.hydra_errors import is_about_settings, sentence

FULL_ERROR = "HYDRA_FULL_ERROR"  # hydra then raises its errors instead of printing them over several lines


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    """Run one trajectory: compose, check, edit, measure, report; or with prepare_only what comes before it."""
    from editeval.build import folder, switch
    from editeval.experiment import prepare, run
    from editeval.sweep.watch import watching
    from editeval.types import EditevalError

    try:
        alone = switch(config.prepare_only, "prepare_only")
        with watching(folder(config.paths.runs, "paths.runs"), HydraConfig.get().overrides.task) as watch:
            if alone:
                prepare(config)
            else:
                run(config, watch)
    except EditevalError as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # the other jobs of the sweep still run; hydra reports this one at the end
        sys.exit(f"error: {error}")


def launch() -> None:
    """Run `main`; what is wrong with the command line becomes one sentence."""
    wants_traceback = FULL_ERROR in os.environ
    os.environ[FULL_ERROR] = "1"
    try:
        main()
    except Exception as error:
        if wants_traceback or not is_about_settings(error):
            raise
        sys.exit(f"error: {sentence(error, sys.argv[1:])} ({FULL_ERROR}=1 shows where)")


if __name__ == "__main__":
    launch()
