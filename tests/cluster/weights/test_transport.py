"""Carriers are found by name or dotted path, once per process."""

from __future__ import annotations

import pytest

from cluster.errors import InputError
from cluster.weights.transport import carrier


def test_the_object_store_is_found_by_its_name() -> None:
    from cluster.weights.object_store import ObjectStore

    assert isinstance(carrier("object_store"), ObjectStore)


def test_a_users_own_carrier_is_made_once_and_found_by_its_dotted_path() -> None:
    found = carrier("tests.support.carriers:NoCarrier")
    assert found.put([]) == ()
    assert carrier("tests.support.carriers:NoCarrier") is found


def test_an_unknown_carrier_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match=r"learner\.weight_carrier: no weight carrier .nccl. \(registered: obj"):
        carrier("nccl")
