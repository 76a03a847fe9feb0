"""The weight store and the carrier through Ray's object store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.actors.remote import kill_actor, start_actor
from cluster.errors import ActorDied, WeightsLost, WeightsRefused
from cluster.weights.manifest import Manifest, TensorEntry
from cluster.weights.store import WeightStore


def manifest(version: int, incarnation: str = "a") -> Manifest:
    return Manifest(version, incarnation, (), (), (), None)


async def test_publication_wakes_waiting_calls() -> None:
    store = WeightStore()
    waiting = asyncio.create_task(store.wait_other(None, timeout_s=5))
    await asyncio.sleep(0)
    await store.publish(manifest(0))
    found = await waiting
    assert found is not None
    assert found.version == 0
    assert await store.wait_other(("a", 0), timeout_s=0.01) is None


async def test_versions_only_rise_within_an_incarnation() -> None:
    store = WeightStore()
    await store.publish(manifest(3))
    with pytest.raises(WeightsRefused, match="version 2: version 3 is already published"):
        await store.publish(manifest(2))
    await store.publish(manifest(2, "b"))
    latest = await store.latest()
    assert latest is not None
    assert latest.incarnation == "b"


async def test_a_version_is_published_again_only_with_the_same_tensors() -> None:
    def held_by(owner: str, checksum: str = "c") -> Manifest:
        return replace(manifest(3), tensors=(TensorEntry("w", (1,), "float32", checksum, owner),))

    store = WeightStore()
    await store.publish(held_by("first"))
    await store.publish(held_by("second"))
    latest = await store.latest()
    assert latest is not None
    assert latest.tensors[0].reference == "second"
    assert await store.wait_other(("a", 3), timeout_s=0.01) is None
    with pytest.raises(WeightsRefused, match="version 3: version 3 is already published"):
        await store.publish(held_by("third", "d"))


class Holder:
    """Puts a version into the object store of its process."""

    async def publish(self) -> Manifest:
        from cluster.weights.object_store import put_tensors

        return replace(manifest(1), tensors=put_tensors([("a", torch.ones(1000))]))


@pytest.mark.ray
async def test_tensors_are_lost_if_their_process_dies(ray_session: None) -> None:
    from cluster.weights.object_store import fetch_tensors

    holder = start_actor(Holder, name="holder")
    published = await holder.publish()
    assert torch.equal(fetch_tensors(published, timeout_s=30)["a"], torch.ones(1000))
    kill_actor(holder)
    with pytest.raises(ActorDied):
        await _for_ever(holder.publish)
    with pytest.raises(WeightsLost, match="version 1: its tensors were lost with their learner"):
        await _for_ever(lambda: asyncio.to_thread(fetch_tensors, published, timeout_s=30))


async def _for_ever(call: Callable[[], Awaitable[Any]]) -> None:
    """The owner's death takes a moment to be known."""
    while True:
        await call()


@pytest.mark.ray
@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
def test_tensors_of_every_dtype_arrive_bit_for_bit(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    from cluster.weights import object_store
    from cluster.weights.object_store import fetch_tensors, put_tensors

    monkeypatch.setattr(object_store, "BUCKET_BYTES", bucket_bytes)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).bfloat16(),
        "c": torch.arange(3),
        "d": torch.tensor(3.0),
    }
    published = replace(manifest(1), tensors=put_tensors(tensors.items()))
    assert len({entry.reference.bucket for entry in published.tensors}) == {1: 4, 64: 2, 2**20: 1}[bucket_bytes]
    arrived = fetch_tensors(published, timeout_s=30)
    assert all(
        torch.equal(arrived[name], tensor) and arrived[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )

    (other,) = put_tensors([("a", torch.randn(3, 5))])
    torn = replace(
        published, tensors=(replace(published.tensors[0], reference=other.reference), *published.tensors[1:])
    )
    with pytest.raises(WeightsRefused, match="a: the bytes of version 1"):
        fetch_tensors(torn, timeout_s=30)
