"""A second device that is none: tensors that say they lie on `meta:1`, and hold their numbers on the CPU.

An operation over tensors of two devices fails as it does between GPUs; moving with `to` works. So what a model spread by a device map
needs of the code (which transfers, where) is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

SECOND = torch.device("meta", 1)
CPU = torch.device("cpu")
TRANSFERS = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::_index_put", "aten::_unsafe_index")  # these take indices of the CPU


class Elsewhere(Tensor):
    """A tensor on the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[Elsewhere], held: Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=SECOND
        )
        made.held = held
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Elsewhere) -> None:
        self.held = value.held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """Tensors that are made on the second device are `Elsewhere`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Tensors of Python numbers (`torch.tensor`, lists as indices) reach no dispatcher: they are made on the CPU, and moved."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            return function(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])
        if function is torch.Tensor.__getitem__:
            tensor, index = args
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index) if isinstance(index, tuple) else index
            return function(tensor, index)
        return function(*args, **kwargs)


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """Call an operation on the tensors that the arguments hold; its result lies where the arguments, or `device`, say."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    name = function._schema.name
    if any(tensor.is_meta and not isinstance(tensor, Elsewhere) for tensor in tensors):
        raise RuntimeError(f"{name} got a tensor that was put on {SECOND} past this stand-in; its numbers are lost")
    if not name.startswith((*TRANSFERS, *INDEXING)):
        places = {isinstance(tensor, Elsewhere) for tensor in tensors if tensor.dim() or isinstance(tensor, Elsewhere)}
        if len(places) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found two: cpu and {SECOND}")
    there = bool(tensors) and isinstance(tensors[0], Elsewhere)
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device) == SECOND
        kwargs = {**kwargs, "device": CPU}
    plain_args, plain_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    result = function(*plain_args, **plain_kwargs)
    if name.endswith("_"):  # in place: the argument itself is the result
        return args[0]
    return tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, Tensor) and there else leaf, result)


def move(module: nn.Module) -> None:
    """Put the parameters and buffers of a module on the second device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(Elsewhere(parameter.data), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, Elsewhere(buffer), persistent=name in part.state_dict())


def spread(module: nn.Module, paths: Sequence[str], *, head: str) -> None:
    """Put the modules at `paths` on the second device, with the hooks that a device map would give them; `head` stays on the CPU."""
    for path in paths:
        part = module.get_submodule(path)
        move(part)
        hook = AlignDevicesHook(execution_device=SECOND, io_same_device=False, skip_keys=["past_key_values"])
        add_hook_to_module(part, hook)
    add_hook_to_module(module.get_submodule(head), AlignDevicesHook(execution_device=CPU, io_same_device=False))


@contextmanager
def two_devices() -> Iterator[None]:
    """Within the context, what is made on or moved to the second device is `Elsewhere`."""
    with Literals(), TwoDevices():
        yield
