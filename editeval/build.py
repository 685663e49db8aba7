"""From a node of the config to the object that it names, with a sentence for whatever is wrong in it.

Example:
    >>> from omegaconf import OmegaConf
    >>> from editeval.build import build
    >>> from editeval.interfaces import EditMethod
    >>> build(OmegaConf.load("conf/method/none.yaml"), "method", EditMethod)   # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from editeval.types import ConfigError

Kind = TypeVar("Kind")

_PLAIN = frozenset({"bool", "int", "float", "str", "None"})


def build(node: DictConfig, where: str, kind: type[Kind]) -> Kind:
    """Instantiate a config node, naming a field that its class does not have.

    Raises:
        ConfigError: no `_target_`, an unknown class or field, or a value that the class refuses.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(f"{where} has no _target_; choose a file of conf/{where.split('.')[0]}, got {node!r}")
    try:
        target = get_class(node._target_)
    except Exception as error:
        raise ConfigError(f"{where}._target_={node._target_} is no class that can be imported: {error}") from error
    if dataclasses.is_dataclass(target):
        allowed = {field.name for field in dataclasses.fields(target) if field.init}
        for key in node:
            if not str(key).startswith("_") and key not in allowed:
                near = difflib.get_close_matches(str(key), sorted(allowed), n=1)
                hint = f"did you mean {where}.{near[0]}?" if near else f"{where} knows: {', '.join(sorted(allowed))}"
                raise ConfigError(f"{where} has no setting {key!r}; {hint}")
        _check_types(dataclasses.fields(target), node, where)
    try:
        made = instantiate(node, _convert_="all")
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        reason, _, _ = str(cause).partition("\n")  # the lines behind the first say where omegaconf was
        raise ConfigError(reason if reason.startswith(where) else f"{where}: {reason}") from error
    if not isinstance(made, kind):
        raise ConfigError(f"{where}._target_={node._target_} is not a {kind.__name__}; see editeval/interfaces.py for what it must do")
    return made


def rungs_of(num_edits: int | ListConfig | Sequence[int] | None) -> tuple[int, ...]:
    """Return the numbers of edits at which to measure: sorted, without repeats, with 0 (the unedited model) first.

    Raises:
        ConfigError: not a non-negative integer or a list of them, or an empty list.
    """
    values: list[Any] = list(num_edits) if isinstance(num_edits, (ListConfig, list, tuple)) else [num_edits]
    if not values:
        raise ConfigError("num_edits=[] names no number of edits; set num_edits=0 to measure the unedited model alone")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(
                f"num_edits={num_edits} must be a number of edits or a list of them, such as num_edits=[1,10,100]; got {value!r}"
            )
    return tuple(sorted({0, *values}))


def resolve(config: DictConfig) -> Mapping[str, Any]:
    """Return the whole config as plain values, every reference replaced by what it names.

    Raises:
        ConfigError: a value that is still missing, or a reference to nothing.
    """
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value yet; set {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config does not resolve: {error}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def positive(value: Any, name: str) -> int:
    """Return the value.

    Raises:
        ConfigError: it is no whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
    return value


def whole(value: Any, name: str) -> int:
    """Return the value.

    Raises:
        ConfigError: it is no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={_shown(value)} must be a whole number")
    return value


def switch(value: Any, name: str) -> bool:
    """Return the value.

    Raises:
        ConfigError: it is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={_shown(value)} must be true or false")
    return value


def folder(value: Any, name: str) -> Path:
    """Return the path that the value names.

    Raises:
        ConfigError: it is no text.
    """
    if not isinstance(value, (str, Path)):
        raise ConfigError(f"{name}={_shown(value)} must be the path of a folder, such as {name}=DIR")
    return Path(value)


def _shown(value: Any) -> str:
    """Return a value as the command line would have it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _check_types(fields: Sequence[dataclasses.Field[Any]], node: DictConfig, where: str) -> None:
    """Refuse a plain value of another type than its field's: `method.layer=` is an empty text where a number belongs.

    No number may be infinite, and nothing null whose field does not say so.

    Raises:
        ConfigError: names field, value and what is allowed.
    """
    for field in fields:
        allowed = str(field.type).split(" | ")  # annotations are text: what they name need not be imported
        value = node.get(field.name)
        kind = "None" if value is None else type(value).__name__
        if field.name not in node or kind not in _PLAIN:
            continue  # nested nodes and lists are judged by the class itself
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}.{field.name}={value} must be a finite number")
        if set(allowed) <= _PLAIN:
            if kind not in allowed and not (kind == "int" and "float" in allowed):
                raise ConfigError(f"{where}.{field.name}={value!r} must be {' or '.join(allowed).replace('None', 'null')}, got {kind}")
        elif value is None and not {"None", "Any"} & set(allowed) and "Optional" not in str(field.type):
            raise ConfigError(f"{where}.{field.name}=null must be a {field.type}; leave it out")
