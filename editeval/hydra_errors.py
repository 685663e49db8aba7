"""What is wrong with a command line of settings, as one sentence: Hydra's own words fill a screen.

Only hydra and omegaconf are imported, so that a wrong setting is told of at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).resolve().parents[1] / "conf"

_NO_OPTION = "Config group override must be"  # how hydra's ValueError for GROUP=null begins; it has no class of its own
_NONE = {"logger": "logger=[]", "callback": "callback=silent"}  # what stands for nothing, in groups that may be left empty


def is_about_settings(error: BaseException) -> bool:
    """Return whether `sentence` has words for an error that came up while a command line was composed."""
    return isinstance(error, (HydraException, OmegaConfBaseException)) or (
        isinstance(error, ValueError) and str(error).startswith(_NO_OPTION)
    )


def sentence(error: Exception, overrides: Sequence[str]) -> str:
    """Return what is wrong with a command line as one sentence: what, what is allowed, what was meant."""
    if isinstance(error, ValueError) and not isinstance(error, (HydraException, OmegaConfBaseException)):
        return _without_option(overrides) or str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
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
    reason = str(error.__cause__).partition("\n")[0] if str(error).startswith("Error merging") and error.__cause__ else ""
    return " ".join(f"{error}: {reason}".split()) if reason else " ".join(str(error).split())


def _without_option(overrides: Sequence[str]) -> str | None:
    """Return the sentence for a group that was given no name, such as `logger=null`."""
    for override in OverridesParser.create().parse_overrides([text for text in overrides if "=" in text and not text.startswith("-")]):
        group, value, text = override.key_or_group, override.value(), override.input_line
        if override.is_sweep_override() or isinstance(value, (str, list)) or not (CONF / group).is_dir():
            continue
        options = [path.stem for path in (CONF / group).glob("*.yaml")]
        if value is not None:
            return f"{group} has no option {value!r}; {_nearest(str(value), options)}"
        if group in _NONE:
            return f"{text} is not possible; for none write {_NONE[group]}"
        if group in ("debug", "sweep") or not options:
            return f"{text} is not possible; for none leave it out"
        return f"{text} is not possible, a run needs one; {_nearest('', options)}"
    return None


def _unreadable(override: str) -> str:
    """Return the sentence for an override that hydra's grammar does not know."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is no setting; write KEY=VALUE"
    shown = value.strip("'\"")
    return (
        f"{override} cannot be read; where a value holds letters beyond a to z, spaces or signs, quote it twice, for the shell and for "
        f"hydra: '{key}=\"{shown}\"'"
    )


def _nearest(word: str, allowed: Iterable[str]) -> str:
    known = sorted(allowed)
    near = difflib.get_close_matches(word, known, n=1)
    names = ", ".join(known)
    return f"did you mean {near[0]!r}? Known: {names}" if near else f"known: {names}"
