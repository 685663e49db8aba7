"""Edit a language model and measure what that costs: `python launch.py [group=option] [key=value] [-m]`.

Only hydra is imported at the top, so that `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

FULL_ERROR = "HYDRA_FULL_ERROR"  # hydra then raises its errors instead of printing them over several lines


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


def sentence(error: HydraException | OmegaConfBaseException) -> str:
    """Return what is wrong with the command line as one sentence: what, what is allowed, what was meant."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        # hydra gives no options for one of a list such as benchmark=[a,b]
        options = error.options or [path.stem for path in (Path(__file__).parent / "conf" / group).glob("*.yaml")]
        return f"{group} has no option {option!r}; {_nearest(option, options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and isinstance(cause.parent_node, DictConfig):
        key = str(cause.key)
        if cause.full_key == f"benchmark.{key}" and any(re.match(r"benchmark=[^\[]*,", text) for text in sys.argv):
            return f"settings of a benchmark go with a list: write benchmark=[{key},...] instead of benchmark={key},..."
        return f"there is no setting {cause.full_key!r}; {_nearest(key, map(str, cause.parent_node))}"
    return " ".join(str(error).split())


def _nearest(word: str, allowed: Iterable[str]) -> str:
    known = sorted(allowed)
    near = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}"


if __name__ == "__main__":
    wants_traceback = FULL_ERROR in os.environ
    os.environ[FULL_ERROR] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        sys.exit(f"error: {sentence(error)} ({FULL_ERROR}=1 shows where)")
