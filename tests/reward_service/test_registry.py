from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InputError
from reward_service.config import RewardServiceConfig
from reward_service.registry import build_scorer, check_scorer


@pytest.mark.parametrize(
    ("scorer", "what"),
    [
        ("tests.no_such:length", "cannot import tests.no_such: ModuleNotFoundError"),
        ("tests.scorers:no_such", "module tests.scorers has no function 'no_such'"),
        ("tests.scorers:text", "module tests.scorers has no function 'text'"),
        ("tests.scorers", "is neither 'reward_model' nor of the form module:function"),
    ],
)
def test_a_scorer_that_is_not_there_is_an_input_error(scorer: str, what: str) -> None:
    with pytest.raises(InputError, match=r"^reward_service\.scorer: ") as caught:
        check_scorer(RewardServiceConfig(scorer=scorer), None)
    assert what in caught.value.what


@pytest.mark.parametrize("folder", [None, Path("/nowhere")])
def test_an_untrained_reward_model_says_how_to_train_it(folder: Path | None) -> None:
    with pytest.raises(InputError) as caught:
        build_scorer(RewardServiceConfig(), folder)
    assert str(caught.value) == "reward_model: not trained (run antiphon reward-model)"


def test_a_function_is_found_by_its_dotted_path() -> None:
    scorer = build_scorer(RewardServiceConfig(scorer="tests.scorers:length"), None)
    assert scorer.name == "tests.scorers:length"
