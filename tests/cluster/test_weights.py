"""The weight store and the carrier through Ray's object store."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from cluster.errors import WeightsRefused
from cluster.weights import Manifest, WeightStore


def manifest(version: int, incarnation: str = "a") -> Manifest:
    return Manifest(version, incarnation, (), (), (), None)


async def test_whoever_waits_for_newer_weights_is_woken_by_publication() -> None:
    store = WeightStore()
    waiting = asyncio.create_task(store.wait_other(None, timeout_s=5))
    await asyncio.sleep(0)
    await store.publish(manifest(0))
    assert (await waiting).version == 0
    assert await store.wait_other(("a", 0), timeout_s=0.01) is None


async def test_versions_only_rise_within_an_incarnation() -> None:
    store = WeightStore()
    await store.publish(manifest(3))
    with pytest.raises(WeightsRefused, match="version 3: version 3 is already published"):
        await store.publish(manifest(3))
    await store.publish(manifest(2, "b"))
    assert (await store.latest()).incarnation == "b"


@pytest.mark.ray
@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
def test_tensors_of_every_dtype_arrive_bit_for_bit_and_an_altered_one_is_named(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    from cluster import weights_object_store
    from cluster.weights_object_store import fetch_tensors, put_tensors

    monkeypatch.setattr(weights_object_store, "BUCKET_BYTES", bucket_bytes)
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
