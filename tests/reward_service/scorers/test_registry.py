from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from cluster.errors import InputError
from cluster.scoring import Score, ScoreRequest
from reward_service.config.scorers import ScorerConfig
from reward_service.config.service import RewardServiceConfig
from reward_service.sandbox import sandbox
from reward_service.scorers.registry import build_scorers, check_scorers
from reward_service.scorers.scorer import SCORER_KINDS, close
from tests.support.building import build_scorer
from tests.support.paths import ROOT

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("scorer", "what"),
    [
        ("tests.no_such:length", "no module 'tests.no_such' (searched "),
        ("tests.support.scorers:no_such", "tests.support.scorers has no function 'no_such'"),
        ("tests.support.scorers:text", "tests.support.scorers has no function 'text'"),
        ("tests.support.scorers", "is neither 'reward_model' nor of the form module:function"),
    ],
)
def test_missing_scorer_function_is_an_input_error(scorer: str, what: str) -> None:
    with pytest.raises(InputError, match=r"^reward_service\.scorer: ") as caught:
        check_scorers(RewardServiceConfig(scorer=scorer), None)
    assert what in caught.value.what


@pytest.mark.parametrize("folder", [None, Path("/nowhere")])
def test_an_untrained_reward_model_says_how_to_train_it(folder: Path | None) -> None:
    with pytest.raises(InputError) as caught:
        build_scorer(RewardServiceConfig(), folder)
    assert str(caught.value) == "reward_model: not trained (run antiphon reward-model)"


def test_a_function_is_found_by_its_dotted_path() -> None:
    scorer = build_scorer(RewardServiceConfig(scorer="tests.support.scorers:length"), None)
    assert scorer.name == "tests.support.scorers:length"


def settings(scorer: str = "tests.support.scorers:length", **scorers: dict[str, Any]) -> RewardServiceConfig:
    return RewardServiceConfig.model_validate({"scorer": scorer, "scorers": scorers})


def texts(*responses: str) -> list[ScoreRequest]:
    return [ScoreRequest(f"7-{i}-0", "say ", response, {"references": "7"}) for i, response in enumerate(responses)]


ALL: dict[str, Any] = {
    "function": {"kind": "function", "path": "tests.support.scorers:length"},
    "exact": {"kind": "exact"},
    "numeric": {"kind": "numeric"},
    "math": {"kind": "math"},
    "regex": {"kind": "regex", "pattern": "a"},
    "length": {"kind": "length", "max": 3},
    "truncation": {"kind": "truncation"},
    "json_schema": {"kind": "json_schema", "json_schema": {"type": "number"}},
    "repetition": {"kind": "repetition"},
    "language": {"kind": "language", "language": "en"},
    "forbidden": {"kind": "forbidden", "phrases": ("bomb",)},
    "guarded": {"kind": "forbidden", "function": "tests.support.scorers:length"},
    "judge": {"kind": "judge", "url": "http://127.0.0.1:9", "model": "m", "rubric": "{response}"},
    "all": {"kind": "composite", "parts": {"exact": 1.0, "length": 1.0}, "gates": ("forbidden",)},
}


async def test_every_kind_is_built_with_its_name_and_version() -> None:
    scorers = build_scorers(settings(**ALL), None)
    again = build_scorers(settings(**ALL), None)
    assert set(scorers) == {*ALL, "tests.support.scorers:length"}
    assert [scorer.name for scorer in scorers.values()] == list(scorers)
    assert all(scorer.version.startswith(f"{name}@") for name, scorer in scorers.items())
    assert {name: scorer.version for name, scorer in again.items()} == {n: s.version for n, s in scorers.items()}
    for scorer in (*scorers.values(), *again.values()):
        await close(scorer)


@pytest.mark.process
async def test_every_kind_scores_with_parts() -> None:
    local = {name: section for name, section in ALL.items() if name != "judge"}
    scorers = build_scorers(settings(scorer="all", **local), None)
    for name, scorer in scorers.items():
        (outcome,) = await scorer.score(texts("7"))
        assert isinstance(outcome, Score), (name, outcome)
        assert outcome.parts
        assert outcome.scorer_version == scorer.version
        assert outcome.reward == {"regex": 0.0, "truncation": -1.0, "length": 0.0, "repetition": 0.0}.get(
            name, 0.0 if name == "language" else 1.0
        )
    for scorer in scorers.values():
        await close(scorer)


def test_run_uses_the_named_scorer() -> None:
    scorer = build_scorer(settings(scorer="exact", exact={"kind": "exact"}), None)
    assert scorer.name == "exact"


def test_composites_share_their_scorers(reward_model_folder: Path) -> None:
    part = {"kind": "composite", "parts": {"reward_model": 1.0, "exact": 1.0}}
    scorers: Any = build_scorers(settings("one", one=part, two=part, exact={"kind": "exact"}), reward_model_folder)
    assert set(scorers) == {"one", "two", "exact", "reward_model"}
    for name in ("exact", "reward_model"):
        assert scorers["one"]._scorers[name] is scorers["two"]._scorers[name] is scorers[name]


@pytest.mark.parametrize("change", [{"max": 4}, {"max": 3, "unit": "words"}, {"max": 3, "penalty": 2.0}])
def test_version_changes_with_a_setting(change: dict[str, Any]) -> None:
    first, second = (build_scorer(settings("a", a={"kind": "length"} | given), None) for given in ({"max": 3}, change))
    assert first.version != second.version


RULE_SCORER, CHECKED_RULES = "scorers/rule_scorer.py", "scorers/checked_rules.py"
SOURCES = {
    "exact": (RULE_SCORER, "scorers/rules.py"),
    "length": (RULE_SCORER, "scorers/rules.py"),
    "forbidden": (RULE_SCORER, "scorers/forbidden.py"),
    "math": (RULE_SCORER, CHECKED_RULES, "sandbox/worker_child.py"),
    "json_schema": (RULE_SCORER, CHECKED_RULES, "sandbox/worker_child.py"),
    "code": (
        RULE_SCORER,
        "parsing/fenced.py",
        "scorers/code_rule.py",
        "sandbox/sandbox.py",
        "sandbox/sandbox_child.py",
    ),
}


@pytest.mark.parametrize(("kind", "source"), [(kind, source) for kind, names in SOURCES.items() for source in names])
def test_version_changes_with_one_byte_of_a_file_that_decides_a_score(
    kind: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = ROOT / "reward_service" / source, Path.read_bytes
    config = settings("a", a=ALL.get(kind, {"kind": kind}))
    monkeypatch.setattr(sandbox, "check_confinement", lambda limits, where: None)
    before = build_scorer(config, None).version
    assert build_scorer(config, None).version == before
    monkeypatch.setattr(Path, "read_bytes", lambda each: read(each) + (b"#" if each == path else b""))
    assert build_scorer(config, None).version != before


def test_every_settings_class_has_a_registered_kind() -> None:
    classes = get_args(get_args(ScorerConfig)[0])
    kinds = [get_args(each.model_fields["kind"].annotation)[0] for each in classes]
    assert sorted(SCORER_KINDS) == sorted(kinds)


def test_version_of_forbidden_depends_on_the_file_content(tmp_path: Path) -> None:
    def version(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return build_scorer(settings("a", a={"kind": "forbidden", "path": tmp_path / name}), None).version

    assert version("one", "bomb") == version("two", "bomb") != version("three", "bombs")


@pytest.mark.parametrize(
    ("section", "where", "what"),
    [
        (
            {"kind": "function", "path": "tests.support.scorers:no"},
            "reward_service.scorers.a.path",
            "has no function 'no'",
        ),
        ({"kind": "forbidden", "function": "no:f"}, "reward_service.scorers.a.function", "no module 'no'"),
        ({"kind": "forbidden", "path": "/nowhere"}, "/nowhere", "cannot be read"),
        ({"kind": "json_schema", "path": "/nowhere"}, "/nowhere", "cannot be read"),
        ({"kind": "reward_model", "path": "/nowhere"}, "reward_service.scorers.a.path", "no reward model in /nowhere"),
        (ALL["judge"] | {"api_key_variable": "NO_KEY"}, "reward_service.scorers.a.api_key_variable", "NO_KEY is not"),
        ({"kind": "composite", "parts": {"reward_model": 1.0}}, "reward_model", "not trained"),
    ],
)
def test_missing_requirement_of_a_scorer_is_named(section: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(InputError) as caught:
        check_scorers(settings(a=section), None)
    assert caught.value.where == where
    assert what in caught.value.what


def test_unsupported_language_is_rejected_when_the_scorer_is_built() -> None:
    with pytest.raises(InputError, match="py3langid does not know qqq"):
        build_scorers(settings(a={"kind": "language", "language": "qqq"}), None)


async def test_statistics_of_a_reward_model_normalize_it(reward_model_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(reward_model_folder, tmp_path / "other"))
    part = {"kind": "composite", "parts": {"other": 2.0}, "normalize": {"other": "reward_statistics"}}
    config = settings("a", a=part, other={"kind": "reward_model", "path": other})
    with pytest.raises(InputError, match=r"reward_statistics\.json: cannot be read"):
        check_scorers(config, None)
    (other / "reward_statistics.json").write_text('{"mean": 0.5, "std": 0.25, "num": 3}')
    scorers = build_scorers(config, None)
    (whole,) = await scorers["a"].score(texts("abc"))
    (raw,) = await scorers["other"].score(texts("abc"))
    assert isinstance(whole, Score)
    assert isinstance(raw, Score)
    assert math.isclose(whole.reward, 2 * (raw.reward - 0.5) / 0.25, abs_tol=1e-5)
    assert whole.parts["other"] == pytest.approx(raw.reward, abs=1e-6)
    before = scorers["a"].version
    (other / "reward_statistics.json").write_text('{"mean": 0.6, "std": 0.25, "num": 3}')
    assert build_scorer(config, None).version != before


def test_service_of_several_scorers_keeps_their_names_and_versions() -> None:
    config = RewardServiceConfig.model_validate({"scorers": {"answer": {"kind": "exact"}}})
    path = "tests.support.scorers:length"
    served = config.serving(["answer", "none", path, "answer"])
    assert (served.scorer, set(served.scorers)) == ("answer", {"answer", path})
    built = build_scorers(served, None)
    assert built[path].version == build_scorer(RewardServiceConfig(scorer=path), None).version
    assert config.serving([path]) == config.model_copy(update={"scorer": path})
    assert config.serving(["none"]).scorer == "none"


def test_reward_model_is_needed_if_any_scorer_uses_it() -> None:
    config = RewardServiceConfig(scorer="none")
    assert config.serving(["tests.support.scorers:length", "reward_model"]).needs_reward_model()
    assert not config.serving(["tests.support.scorers:length"]).needs_reward_model()
