"""Calls of actors in other processes: what they raise."""

from __future__ import annotations

import pytest

from cluster.actors.remote import kill_actor, start_actor
from cluster.errors import InputError


class Broken:
    """An actor whose constructor raises."""

    def __init__(self, path: str) -> None:
        raise FileNotFoundError(f"no such file: {path}")

    async def ask(self) -> None:
        """Never runs."""


@pytest.mark.ray
async def test_a_constructor_that_raises_is_no_death_of_a_process(ray_session: None) -> None:
    actor = start_actor(Broken, "weights.bin", name="broken")
    with pytest.raises(InputError, match=r"broken: it cannot be constructed: .*no such file: weights\.bin"):
        await actor.ask()
    kill_actor(actor)
