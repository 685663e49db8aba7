"""Look into a forward pass, or change it, through hooks that are always removed.

Both functions are context managers. Hidden states have the shape (batch, positions, width) of the module they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


class _Stopped(Exception):  # noqa: N818  (a signal, not an error)
    """Everything wanted was seen; `run_until` swallows this."""

    def __init__(self) -> None:
        super().__init__("the forward pass was cut short by capture(stop=True); call the model through editeval.models.trace.run_until")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What went into and came out of the traced modules, by path; a later forward pass overwrites an earlier one."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def capture(
    module: nn.Module,
    paths: Sequence[str],
    *,
    inputs: bool = False,
    outputs: bool = False,
    stop: bool = False,
    detach: bool = True,
    clone: bool = False,
) -> Iterator[Trace]:
    """Record the first input and / or the output tensor of the modules at `paths` (relative to `module`).

    `detach` cuts the record from autograd. `clone` copies it, which is needed only where something later writes in place.
    `stop` ends each forward pass as soon as everything wanted was seen; where only inputs are wanted the last module itself
    no longer runs. With `stop` call the model through `run_until`.

    Raises:
        ValueError: nothing is to be recorded.
        AttributeError: a path that the module does not have.
        TypeError: a module without a tensor as its input or output.
    """
    if not paths or not (inputs or outputs):
        raise ValueError(f"nothing to capture: paths={list(paths)}, inputs={inputs}, outputs={outputs}; give a path and inputs or outputs")
    trace = Trace()
    wanted = frozenset(paths)
    seen: set[str] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept = tensor.detach() if detach else tensor
        return kept.clone() if clone else kept

    def finished(path: str) -> None:
        if path in seen:  # a new pass, after one that failed midway
            seen.clear()
        seen.add(path)
        if stop and seen == wanted:
            seen.clear()
            raise _Stopped

    def before(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(submodule: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            trace.inputs[path] = keep(_first_input(submodule, arguments, keywords))
            if not outputs:
                finished(path)

        return hook

    def after(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(submodule: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
            trace.outputs[path] = keep(_first_output(submodule, output))
            finished(path)

        return hook

    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            submodule = module.get_submodule(path)
            if inputs:
                stack.callback(submodule.register_forward_pre_hook(before(path), with_kwargs=True).remove)
            if outputs:
                stack.callback(submodule.register_forward_hook(after(path)).remove)
        yield trace


def run_until(forward: Callable[..., object], /, **arguments: Any) -> None:
    """Call a model inside `capture(stop=True)`: the forward pass ends where the last wanted module was seen."""
    try:
        forward(**arguments)
    except _Stopped:
        return


@contextmanager
def replace_output(module: nn.Module, path: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context the module at `path` returns `function(output)`; other items of a tuple output stay.

    `function` gets the output itself and must return a new tensor of the same shape (add a delta, do not write in place).

    Raises:
        AttributeError: a path that the module does not have.
        TypeError: a module without a tensor as its output.
    """

    def hook(submodule: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG001
        replaced = function(_first_output(submodule, output))
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _first_input(submodule: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    # Attention modules are called with keywords only.
    value = arguments[0] if arguments else keywords.get("hidden_states")
    if not isinstance(value, Tensor):
        raise TypeError(f"{type(submodule).__name__} got {type(value).__name__} as its first input; only tensors can be captured")
    return value


def _first_output(submodule: nn.Module, output: Any) -> Tensor:
    value = output[0] if isinstance(output, tuple) else output
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{type(submodule).__name__} returned {type(value).__name__}; only tensors and tuples that begin with one can be captured"
        )
    return value
