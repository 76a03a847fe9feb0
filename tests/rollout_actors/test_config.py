"""Tests of the sections `[rollout_actors]` and `[environment]`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.errors import InputError
from rollout_actors.adapters.gymnasium import GymnasiumText
from rollout_actors.config import ADAPTERS, RENAMED, EnvironmentConfig
from rollout_actors.environments.protocol import make_environment


@pytest.mark.parametrize("path", ["gymnasium", "rollout_actors.adapters.gymnasium:GymnasiumText"])
def test_an_adapter_is_found_by_its_name_and_by_its_dotted_path(path: str) -> None:
    assert isinstance(make_environment(path, {"id": "FrozenLake-v1"}), GymnasiumText)


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_every_adapter_name_can_be_imported(name: str) -> None:
    assert callable(ADAPTERS.find(name, key="environment.path"))


def test_the_error_names_the_adapters_if_there_is_none_of_that_name() -> None:
    with pytest.raises(InputError, match=r"environment\.path: no environment adapter 'gym' \(registered: gymnasium, "):
        make_environment("gym", {})


@pytest.mark.parametrize("path", list(RENAMED))
def test_a_renamed_path_is_refused_with_its_new_name(path: str) -> None:
    with pytest.raises(ValidationError, match=f'has been renamed; write path = "{RENAMED[path]}"'):
        EnvironmentConfig(path=path)
