"""Edited weights with an exact way back.

The base copy of a matrix is made on the CPU when it is first written. Edits add up in a float32 master: small updates would vanish
in half precision. For a float32 parameter the master is the parameter itself; else the parameter is the master's rounding.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from editeval.edits.delta import WeightDelta
from editeval.edits.dense import dense, shape_of
from editeval.models.model import LanguageModel
from editeval.types import EditError, EditevalError


class EditedWeights:
    """The parameters of a model under edits. Matrices come and go as (d_out, d_in), whatever the module stores."""

    def __init__(self, lm: LanguageModel) -> None:
        self._parameters = dict(lm.module.named_parameters(remove_duplicate=False))
        # A tied parameter has several names; all its edits are kept under the first.
        first_names: dict[int, str] = {}
        self._canonical = {name: first_names.setdefault(id(parameter), name) for name, parameter in self._parameters.items()}
        self._turned_prefix = lm.sites.layers.split("{}")[0] if lm.sites.transposed else None
        self._base: dict[str, Tensor] = {}
        self._masters: dict[str, Tensor] = {}
        self._hidden = False

    def add(self, deltas: Sequence[WeightDelta]) -> None:
        """Add the deltas to the masters, and round them into the parameters. All of them, or on an error none.

        The sum does not depend on the device, the number of threads or the live state of a run (see `edits.dense`).

        Raises:
            EditError: a parameter is unknown, a shape is wrong, a number is not finite, or nothing would change.
            EditevalError: within `unedited()`.
        """
        if self._hidden:
            raise EditevalError("the model is shown unedited; leave the unedited() context before an edit is applied")
        # Tensors born in inference mode could not be written to outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            new = self._summed(deltas)
            for name, matrix in new.items():
                self._write(name, matrix)

    def check(self, deltas: Sequence[WeightDelta]) -> None:
        """Raise what `add` would raise, and change nothing."""
        with torch.no_grad():
            self._summed(deltas)

    def restore(self) -> None:
        """Put every base weight back, bit for bit, and drop the copies."""
        if self._hidden:
            raise EditevalError("the model is shown unedited; leave the unedited() context before it is restored")
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, base in self._base.items():
                self._parameters[name].copy_(base)
        self._base.clear()
        self._masters.clear()

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Show the base weights within the context. Storages are exchanged, so both ways are exact."""
        if self._hidden:
            yield
            return
        edited = {name: self._parameters[name].data for name in self._base}
        self._hidden = True
        try:
            for name, base in self._base.items():
                self._parameters[name].data = base.to(edited[name].device)
            yield
        finally:
            for name, tensor in edited.items():
                self._parameters[name].data = tensor
            self._hidden = False

    @contextmanager
    def holding(self, matrices: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold other matrices (d_out, d_in), float32, within the context. Storages are exchanged, so both ways are exact.

        Raises:
            EditError: a parameter is unknown.
        """
        held = {self._resolve(parameter): matrix for parameter, matrix in matrices.items()}
        before = {name: (self._parameters[name].data, self._masters.get(name)) for name in held}
        try:
            for name, matrix in held.items():
                parameter = self._parameters[name]
                stored = self._turn(name, matrix).contiguous()
                parameter.data = stored.to(parameter.dtype)
                if parameter.dtype != torch.float32:
                    self._masters[name] = stored
            yield
        finally:
            for name, (data, master) in before.items():
                self._parameters[name].data = data
                self._masters.pop(name, None)
                if master is not None:
                    self._masters[name] = master

    @property
    def edited(self) -> tuple[str, ...]:
        """Names of the parameters that were edited, sorted."""
        return tuple(sorted(self._base))

    def digest(self) -> str:
        """Return the sha256 over name, dtype, shape and bytes of every edited parameter, and of its master where it has one."""
        digest = hashlib.sha256()
        if not self._hidden:
            for name in sorted(self._base):
                for tensor in (self._parameters[name].data, self._masters.get(name)):
                    if tensor is not None:
                        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def current(self, parameter: str) -> Tensor:
        """Return the weight as float32 (d_out, d_in), the master where there is one."""
        name = self._resolve(parameter)
        master = None if self._hidden else self._masters.get(name)
        tensor = self._parameters[name].data if master is None else master
        return self._turn(name, tensor.float())

    def base(self, parameter: str) -> Tensor:
        """Return the unedited weight as float32 (d_out, d_in), on the parameter's device."""
        name = self._resolve(parameter)
        stored = self._parameters[name].data
        return self._turn(name, self._base.get(name, stored).to(stored.device).float())

    def _resolve(self, parameter: str) -> str:
        if parameter not in self._canonical:
            similar = difflib.get_close_matches(parameter, self._canonical, n=3)
            raise EditError(f"the model has no parameter {parameter!r}; similar: {', '.join(similar) or 'none'}")
        return self._canonical[parameter]

    def _turn(self, name: str, tensor: Tensor) -> Tensor:
        """View a stored matrix as (d_out, d_in), or such a matrix as stored."""
        turned = self._turned_prefix is not None and name.startswith(self._turned_prefix) and tensor.ndim == 2
        return tensor.T if turned else tensor

    def _summed(self, deltas: Sequence[WeightDelta]) -> dict[str, Tensor]:
        """Return the new masters (d_out, d_in) by canonical name; nothing is changed yet."""
        new: dict[str, Tensor] = {}
        for delta in deltas:
            name = self._resolve(delta.parameter)
            old = new[name] if name in new else self.current(name)
            new[name] = old + _checked_dense(delta, like=old)
        for name, matrix in new.items():
            if not torch.isfinite(matrix.to(self._parameters[name].dtype)).all():
                raise EditError(f"the edited {name} is not finite; nothing was applied; check learning rate and clamp")
        if deltas and all(torch.equal(matrix, self.current(name)) for name, matrix in new.items()):
            names = ", ".join(new)
            raise EditError(
                f"the edit changes nothing in {names}: its deltas are zero, or vanish in float32; an edit must change the model"
            )
        return new

    def _write(self, name: str, matrix: Tensor) -> None:
        parameter: nn.Parameter = self._parameters[name]
        if name not in self._base:
            self._base[name] = parameter.detach().cpu().clone()
        if parameter.dtype != torch.float32:
            self._masters[name] = self._turn(name, matrix).contiguous()
        parameter.copy_(self._turn(name, matrix))


def _checked_dense(delta: WeightDelta, *, like: Tensor) -> Tensor:
    """Return dW (d_out, d_in) in float32 on the device of `like`, after all checks.

    Raises:
        EditError: wrong shape, or numbers that are not finite.
    """
    tensors = [value for value in vars(delta).values() if isinstance(value, Tensor)]
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise EditError(f"delta of {delta.parameter} holds numbers that are not finite; nothing was applied")
    shape = shape_of(delta)
    if shape is None:
        sizes = ", ".join(str(_shape(tensor)) for tensor in tensors)
        raise EditError(f"delta of {delta.parameter}: tensors of {sizes} are not what a {type(delta).__name__} is made of")
    if shape != tuple(like.shape):
        raise EditError(f"delta of {delta.parameter} is {shape}; the weight is {tuple(like.shape)} (d_out, d_in)")
    return dense(delta, like.device)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
