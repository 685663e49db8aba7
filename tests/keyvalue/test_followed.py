"""Edits that are in a model are noted once, and noted anew where they are others."""

from __future__ import annotations

import torch

from editeval.keyvalue.followed import FollowedEdits, keys_of, recorded_keys


def test_edits_are_noted_once_and_anew_where_the_model_was_restored_or_holds_others() -> None:
    first, second, third = (recorded_keys({"site": torch.full((1, 2), float(number))}) for number in range(3))
    followed = FollowedEdits()
    assert followed.follow([first]) == (False, [first])
    assert followed.follow([first]) == (False, [])
    assert followed.follow([first, second]) == (False, [second])
    assert followed.follow([first, third]) == (True, [first, third])  # as many, but another one
    assert followed.follow([first]) == (True, [first])
    assert followed.follow([]) == (True, [])
    assert followed.follow([second]) == (False, [second])


def test_keys_are_found_by_the_site_that_they_were_recorded_for() -> None:
    keys_EK = torch.arange(6.0).reshape(3, 2).T
    recorded = recorded_keys({"layers.1": keys_EK})
    found = keys_of(recorded, "layers.1")
    assert found is not None
    assert torch.equal(found, keys_EK)
    assert found.is_contiguous()
    assert keys_of(recorded, "layers.2") is None
