"""What is wrong with a command line of settings, as one sentence: Hydra's own words fill a screen.

Only hydra and omegaconf are imported, so that a wrong setting is told of at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).resolve().parents[1] / "conf"


def sentence(error: HydraException | OmegaConfBaseException, overrides: Sequence[str]) -> str:
    """Return what is wrong with a command line as one sentence: what, what is allowed, what was meant."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        # hydra gives no options for one of a list such as benchmark=[a,b]
        options = error.options or [path.stem for path in (CONF / group).glob("*.yaml")]
        return f"{group} has no option {option!r}; {_nearest(option, options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and isinstance(cause.parent_node, DictConfig):
        key = str(cause.key)
        if cause.full_key == f"benchmark.{key}" and any(re.match(r"benchmark=[^\[]*,", text) for text in overrides):
            return f"settings of a benchmark go with a list: write benchmark=[{key},...] instead of benchmark={key},..."
        return f"there is no setting {cause.full_key!r}; {_nearest(key, map(str, cause.parent_node))}"
    return " ".join(str(error).split())


def _nearest(word: str, allowed: Iterable[str]) -> str:
    known = sorted(allowed)
    near = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}"
