"""Which of a model's edits were taken note of: methods rebuild what they must remember from what the journal holds of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(kw_only=True, eq=False)
class FollowedEdits:
    """The edits that were noted so far, by what each left for later ones (`Edit.auxiliary`)."""

    _noted: list[Mapping[str, Tensor]] = field(default_factory=list)

    def follow(self, applied: Sequence[Mapping[str, Tensor]]) -> tuple[bool, Sequence[Mapping[str, Tensor]]]:
        """Note what is in the model now; return whether earlier notes are void (restored, or other edits), and what is new."""
        void = len(self._noted) > len(applied) or any(mine is not theirs for mine, theirs in zip(self._noted, applied, strict=False))
        new = applied if void else applied[len(self._noted) :]
        self._noted = list(applied)
        return void, new


def keys_of(auxiliary: Mapping[str, Tensor], site: str) -> Tensor | None:
    """Return the keys (E, K) that an edit left for a site, or None where it did not edit there."""
    return auxiliary.get(_name(site))


def recorded_keys(keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the keys of an edit (E, K), by site, as what it leaves for later ones."""
    return {_name(site): keys_EK.contiguous() for site, keys_EK in keys.items()}


def _name(site: str) -> str:
    return f"keys.{site}"
