"""Test the run file: reading, overriding, printing, and the errors of wrong settings."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cluster.errors import InputError
from deploy.config.functions import dotted_paths, scorer_paths
from deploy.config.load import load_run_config, read_run_config
from deploy.config.schema import RunConfig
from deploy.config.toml import flat, to_toml
from reward_service.config.scorers import ForbiddenConfig
from tests.support.paths import ROOT

EXAMPLES = sorted(ROOT.glob("examples/*/run*.toml"))
TINY = '[run]\nstages = ["ppo"]\n[model]\nbuilder = "task:build"\n[data]\nbuilder = "task:data"\n'
TINY += '[reward_service]\nscorer = "task:score"\n'


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("ANTIPHON_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "run.toml").write_text(TINY)
    return Path("task/run.toml")


def refused(run_file: Path, *lines: str) -> tuple[str, str]:
    with pytest.raises(InputError) as refusal:
        load_run_config(run_file, lines)
    return refusal.value.where, refusal.value.what


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_run_file_loads(path: Path) -> None:
    config = load_run_config(path)
    assert config.run.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_printed_run_file_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_run_config(path)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_run_config(tmp_path / "config.toml") == config


def test_printing_keeps_tables_within_lists_and_keys_with_dots(run_file: Path) -> None:
    line = 'rollout_actors.engine = { "a.b" = [{ x = 1 }, { y = [true, "é\\n"] }], c = { d = 1.5 }, e = {} }'
    config = load_run_config(run_file, [line])
    engine = tomllib.loads(to_toml(config))["rollout_actors"]["engine"]
    assert engine == {"a.b": [{"x": 1}, {"y": [True, "é\n"]}], "c": {"d": 1.5}, "e": {}}


def test_a_run_is_named_after_the_folder_of_its_file(run_file: Path) -> None:
    assert load_run_config(run_file).run.name == "task"


def test_an_override_changes_one_key_and_leaves_its_neighbours(run_file: Path) -> None:
    before = flat(load_run_config(run_file))
    after = flat(load_run_config(run_file, ["learner.learning_rate = 5e-7", 'rollout_actors.engine.dtype = "float32"']))
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {"learner.learning_rate", "rollout_actors.engine.dtype"}


def test_path_is_found_beside_the_run_file_before_the_working_directory(run_file: Path) -> None:
    Path("task/near.parquet").touch()
    Path("far.parquet").touch()
    config = load_run_config(run_file, ['data.sft = "near.parquet"', 'data.prompts = "far.parquet"'])
    assert config.data.sft == Path("task/near.parquet")
    assert config.data.prompts == Path("far.parquet")


def test_a_scorers_file_is_found_beside_the_run_file_too(run_file: Path) -> None:
    (run_file.parent / "phrases.txt").write_text("x")
    line = 'reward_service.scorers = { safe = { kind = "forbidden", path = "phrases.txt" } }'
    safe = load_run_config(run_file, [line]).reward_service.scorers["safe"]
    assert isinstance(safe, ForbiddenConfig)
    assert safe.path is not None
    assert safe.path.resolve() == run_file.parent.resolve() / "phrases.txt"


def test_a_printed_scorer_keeps_its_empty_tables(run_file: Path, tmp_path: Path) -> None:
    line = 'reward_service.scorers.a = { kind = "json_schema", json_schema = { properties = { x = {} } } }'
    config = load_run_config(run_file, [line])
    (tmp_path / "printed.toml").write_text(to_toml(config))
    assert read_run_config(tmp_path / "printed.toml").reward_service == config.reward_service


def test_a_path_elsewhere_is_kept_absolute(run_file: Path) -> None:
    assert load_run_config(run_file, ['data.sft = "/data/sft.parquet"']).data.sft == Path("/data/sft.parquet")


def test_max_actors_below_num_actors_is_an_error(run_file: Path) -> None:
    lines = ["rollout_actors.num_actors = 2", "rollout_actors.max_actors = 1"]
    with pytest.raises(InputError, match=r"rollout_actors.max_actors: 1 is less than rollout_actors.num_actors = 2"):
        load_run_config(run_file, lines)


def test_group_estimators_are_refused_with_one_response_per_prompt(run_file: Path) -> None:
    lines = ['learner.advantages = "rloo"', "rollout_actors.responses_per_prompt = 1"]
    with pytest.raises(InputError, match=r"learner.advantages: rloo .*responses_per_prompt is 1"):
        load_run_config(run_file, lines)


@pytest.mark.parametrize(
    ("line", "where", "what"),
    [
        ("learner.learning_rat = 1e-3", "learner.learning_rat", "unknown key (did you mean learning_rate?)"),
        ("lerner.num_steps = 1", "lerner", "unknown key (did you mean learner?)"),
        ("sft.zzz = 1", "sft.zzz", "unknown key"),
        ('learner.learning_rate = "1e-3"', "learner.learning_rate", 'should be a valid number, got "1e-3"'),
        ("learner.learning_rate = nan", "learner.learning_rate", "should be a finite number, got NaN"),
        ("learner.num_steps = 1.5", "learner.num_steps", "should be a valid integer, got 1.5"),
        ("learner.num_steps = true", "learner.num_steps", "should be a valid integer, got true"),
        ("learner.num_steps = 0", "learner.num_steps", "should be greater than or equal to 1, got 0"),
        ("model = 3", "model", "should be a table, got 3"),
        ('run.stages = ["pp"]', "run.stages.0", 'got "pp"'),
        ('run.stages = ["ppo", "sft"]', "run.stages", "in this order"),
        ("run.stages = []", "run.stages", "name at least one"),
        ('run.name = "../x"', "run.name", "should match pattern"),
        ('model.builder = "task"', "model.builder", "is not a dotted path"),
        ('reward_service.scorer = "task.score"', "reward_service.scorer", "is not a dotted path"),
        ("learner.num_minibatches = 7", "learner.num_minibatches", "7 does not divide the 128 responses of a step"),
        ('learner.kl_in = "loss"', "learner.kl_estimator", "k1 has a gradient of mean 0 in the loss"),
        ("learner.importance_floor = 0.5", "learner.importance_floor", "only with importance_outside"),
        ('learner = { importance_outside = "mask", importance_floor = 3 }', "learner.importance_cap", "must be above"),
        ('learner = { decoupled = false, importance_level = "sequence" }', "learner.importance_level", "no importance"),
        (
            'learner = { dual_clip = 3, policy_objective = "cispo" }',
            "learner.dual_clip",
            "cispo clips the importance weight",
        ),
        ('learner = { advantages = "rloo", critic_warmup_steps = 1 }', "learner.critic_warmup_steps", "has no critic"),
        ('learner.critic_from = "reward_model"', "learner.critic_from", "only a separate critic"),
        (
            'learner = { num_learners = 0, data_parallel = "fsdp2" }',
            "learner.data_parallel",
            "num_learners to 1 or more",
        ),
        ('learner.lora.target_modules = ["lm_head"]', "learner.lora.target_modules", "can't be merged"),
        ("learner.lora.rnk = 4", "learner.lora.rnk", "did you mean rank?"),
        ("learner.constraint.max_mean = 0.1", "learner.constraint.cost", "max_mean is set, but no cost"),
        ('learner.constraint = { cost = "x", max_men = 0 }', "learner.constraint.max_men", "did you mean max_mean?"),
        (
            'learner.constraint = { cost = "x", max_multiplier = 0.5 }',
            "learner.constraint.max_multiplier",
            "0.5 is less than initial_multiplier = 1",
        ),
        (
            'learner.constraint = { cost = "x", learning_rate = 0 }',
            "learner.constraint.learning_rate",
            "greater than 0",
        ),
        ("learner.num_learners = 3", "learner.num_learners", "does not divide the 128 responses"),
        ('reward_service.scorer = "nobody"', "reward_service.scorer", "no name in reward_service.scorers"),
        ("reward_service.scorers.a = {}", "reward_service.scorers.a.kind", "missing"),
        ('reward_service.scorers.a.kind = "exat"', "reward_service.scorers.a.kind", "'exat' is none of"),
        (
            'reward_service.scorers.a = { kind = "exact", ignore = true }',
            "reward_service.scorers.a.ignore",
            "did you mean ignore_case?",
        ),
        (
            'reward_service.scorers.a = { kind = "regex", pattern = "(" }',
            "reward_service.scorers.a.pattern",
            "not a regular expression",
        ),
        (
            'reward_service.scorers.exact = { kind = "exact", ignore_case = 1 }',
            "reward_service.scorers.exact.ignore_case",
            "valid boolean",
        ),
        ('reward_service.scorers.1a.kind = "exact"', "reward_service.scorers.1a", "is not a valid name"),
        (
            'reward_service.scorers.a = { kind = "composite", parts = { a = 1 } }',
            "reward_service.scorers.a.parts",
            "goes in a circle: a -> a",
        ),
        (
            'reward_service.scorers.a = { kind = "composite", parts = { b = 1 } }',
            "reward_service.scorers.a.parts",
            "there is no scorer 'b'",
        ),
        (
            'reward_service.scorers.a = { kind = "composite", parts = { reward_model = inf } }',
            "reward_service.scorers.a.parts.reward_model",
            "finite number",
        ),
        (
            'reward_service.scorers.a = { kind = "composite", parts = { reward_model = 1 }, '
            "normalize = { reward_model = { mean = 0.0, std = 0.0 } } }",
            "reward_service.scorers.a.normalize.reward_model.std",
            "greater than 0",
        ),
        (
            'reward_service.scorers.a = { kind = "function", path = "task" }',
            "reward_service.scorers.a.path",
            "is not a dotted path",
        ),
        ("data.adversarial_share = 0.5", "data.adversarial_share", "name the ways"),
        ('adversarial.ways = ["typo"]', "adversarial.ways.0", 'got "typo"'),
        ('adversarial.ways = ["typos", "typos"]', "adversarial.ways", "each way may be named once"),
        ('adversarial.ways = ["paraphrase"]', "adversarial.paraphrase", "needs a function"),
        ('adversarial.paraphrase = "words"', "adversarial.paraphrase", "is not a dotted path"),
        (
            'adversarial.ways = ["typos"]\nenvironment.path = "task:Game"',
            "adversarial.ways",
            "none can be altered",
        ),
        ("rollout_actors.engine.max_model_len = 1000", "rollout_actors.max_response_tokens", "= 1024 tokens, but"),
        ('run.stages = ["preferences"]', "preferences.annotator", "stage preferences needs it"),
        ('reward_service = { host = "0.0.0.0", port = 8000 }', "reward_service.host", "set ANTIPHON_TOKEN"),
        ("reward_service.port = 70000", "reward_service.port", "less than or equal to 65535"),
        ("learner.learning_rate", "--set", "is not a line of TOML"),
        ("run.name = letters", "--set", "text needs quotes"),
    ],
)
def test_a_wrong_setting_is_named(run_file: Path, line: str, where: str, what: str) -> None:
    found_where, found_what = refused(run_file, line)
    assert found_where == where
    assert what in found_what


SAFE = (
    'reward_service.scorers = { safe = { kind = "forbidden", phrases = ["x"] }, brief = { kind = "length", max = 9 } }',
    'reward_service.scorers.all = { kind = "composite", parts = { brief = 1.0, safe = 0.0 } }',
    'reward_service.scorer = "all"',
)


def test_a_cost_that_no_reward_has_is_refused_with_the_known_parts(run_file: Path) -> None:
    assert refused(run_file, *SAFE, 'learner.constraint.cost = "violation"') == (
        "learner.constraint.cost",
        "no reward of all has a part 'violation'; its parts are brief, brief/num_characters, safe, safe/num_forbidden, "
        "safe/violation",
    )
    config = load_run_config(run_file, [*SAFE, 'learner.constraint.cost = "safe/violation"'])
    assert (config.learner.constraint.cost, config.learner.constraint.max_mean) == ("safe/violation", 0.01)


def test_an_environment_may_give_a_cost_of_any_name(run_file: Path) -> None:
    lines = ['environment.path = "task:Env"', 'learner.constraint.cost = "rude"']
    assert load_run_config(run_file, [*SAFE, *lines]).learner.constraint.cost == "rude"


def test_a_run_without_a_model_is_refused(run_file: Path) -> None:
    run_file.write_text('[data]\nbuilder = "task:data"\n')
    assert refused(run_file) == ("model", "give a path or a builder")


@pytest.mark.parametrize(
    ("stage", "key"), [("sft", "data.sft"), ("ppo", "data.prompts"), ("evaluation", "data.prompts")]
)
def test_a_stage_without_its_data_is_refused(run_file: Path, stage: str, key: str) -> None:
    run_file.write_text(f'[run]\nstages = ["{stage}"]\n[model]\nbuilder = "task:build"\n')
    where, what = refused(run_file)
    assert where == key
    assert stage in what


def test_a_service_beyond_loopback_with_a_token_is_accepted(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIPHON_TOKEN", "secret")
    config = load_run_config(run_file, ['reward_service.host = "0.0.0.0"', "reward_service.port = 8000"])
    assert config.reward_service.host == "0.0.0.0"


def test_a_missing_or_invalid_run_file_is_named(run_file: Path) -> None:
    assert refused(Path("none.toml")) == ("none.toml", "cannot read the run file (No such file or directory)")
    run_file.write_text("[run\n")
    assert refused(run_file)[1].startswith("not TOML: ")


def test_defaults_alone_make_a_config() -> None:
    assert RunConfig().run.stages == ("sft", "preferences", "reward_model", "ppo", "evaluation")


TASKS = TINY.replace('[data]\nbuilder = "task:data"\n[reward_service]\nscorer = "task:score"\n', "")
TASKS += '[tasks.sums]\nweight = 2\nbuilder = "task:sums"\nscorer = "task:score"\nmetrics = "task:measure"\n'
TASKS += '[tasks.games]\nscorer = "none"\n[tasks.games.environment]\npath = "task:Game"\nmax_tokens = 700\n'


@pytest.fixture
def several(run_file: Path) -> Path:
    """A run file that names two tasks, one of them with an environment."""
    run_file.write_text(TASKS)
    return run_file


def test_run_has_named_tasks_or_one_unnamed_task_of_the_other_sections(run_file: Path, several: Path) -> None:
    tasks = load_run_config(several).by_task()
    assert {name: (task.weight, task.scorer) for name, task in tasks.items()} == {
        "sums": (2.0, "task:score"),
        "games": (1.0, "none"),
    }
    run_file.write_text(TINY)
    lines = ['environment.path = "task:Game"', 'evaluation.metrics = "task:measure"', 'data.sft = "sft.parquet"']
    config = load_run_config(run_file, lines)
    (task,) = config.by_task().values()
    assert (task.builder, task.sft, task.scorer) == ("task:data", Path("sft.parquet"), "task:score")
    assert (task.environment.path, task.metrics) == ("task:Game", "task:measure")
    assert (list(config.by_task()), config.recorded_as("")) == ([""], "task")


def test_the_functions_of_every_task_are_named_by_their_keys(several: Path) -> None:
    assert dotted_paths(load_run_config(several)) == {
        "model.builder": "task:build",
        "tasks.sums.builder": "task:sums",
        "tasks.sums.scorer": "task:score",
        "tasks.sums.metrics": "task:measure",
        "tasks.games.environment.path": "task:Game",
    }


def test_tasks_paths_are_found_beside_the_run_file_and_kept_if_printed(several: Path, tmp_path: Path) -> None:
    Path("task/near.parquet").touch()
    config = load_run_config(several, ['tasks.sums.prompts = "near.parquet"'])
    assert config.tasks["sums"].prompts == Path("task/near.parquet")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_run_config(tmp_path / "config.toml") == config


def test_the_service_of_several_tasks_has_the_scorers_of_all_of_them(several: Path) -> None:
    lines = [
        'run.stages = ["reward_model", "ppo"]',
        'data.preferences = "pairs.parquet"',
        'tasks.games.scorer = "reward_model"',
    ]
    served = load_run_config(several, lines).served()
    assert (served.scorer, list(served.scorers)) == ("reward_model", ["task:score"])
    assert load_run_config(several).served().scorer == "task:score"


@pytest.mark.parametrize(
    ("line", "where", "what"),
    [
        ('data.builder = "task:data"', "data.builder", "set it in [tasks.sums], [tasks.games]"),
        ('data.evaluation = "x.parquet"', "data.evaluation", "only to a run without [tasks.NAME]"),
        ('reward_service.scorer = "task:score"', "reward_service.scorer", "only to a run without [tasks.NAME]"),
        ('environment.path = "task:Game"', "environment", "only to a run without [tasks.NAME]"),
        ('evaluation.metrics = "task:measure"', "evaluation.metrics", "only to a run without [tasks.NAME]"),
        ('tasks."a.b" = { scorer = "none" }', "tasks.a.b", "is not a valid name"),
        ('tasks.more = { prompts = "x.parquet" }', "tasks.more.scorer", "required"),
        ('tasks.more = { scorer = "task:score" }', "tasks.more.prompts", "stage ppo needs it (or a builder)"),
        ('tasks.sums.scorer = "none"', "tasks.sums.scorer", "no environment is set (tasks.sums.environment.path)"),
        ('tasks.sums.scorer = "nobody"', "tasks.sums.scorer", "no name in reward_service.scorers"),
        ('tasks.sums.metrics = "measure"', "tasks.sums.metrics", "is not a dotted path"),
        ("tasks.sums.weight = 0", "tasks.sums.weight", "greater than 0"),
        ("tasks.sums.wieght = 1", "tasks.sums.wieght", "did you mean weight?"),
        ("tasks.games.environment.max_turn = 1", "tasks.games.environment.max_turn", "did you mean max_turns?"),
        ("tasks.games.environment.max_tokens = 512", "tasks.games.environment.max_tokens", "leave no room after"),
        ('tasks.games.scorer = "reward_model"', "tasks.games.scorer", "the run trains no reward model"),
        ("rollout_actors.engine.max_model_len = 1000", "rollout_actors.max_response_tokens", "= 1024 tokens, but"),
        (
            "rollout_actors = { max_response_tokens = 9, engine = { max_model_len = 600 } }",
            "tasks.games.environment.max_tokens",
            "700 tokens, but",
        ),
        ('run.stages = ["preferences", "ppo"]', "run.stages", "preferences are sampled for a single task only"),
        ('adversarial.ways = ["typos"]', "adversarial", "only to a run without [tasks.NAME]"),
        ("data.adversarial_share = 0.5", "data.adversarial_share", "only to a run without [tasks.NAME]"),
        ("tasks.sums.adversarial_share = 0.5", "tasks.sums.adversarial_share", "(tasks.sums.adversarial.ways)"),
        ('tasks.games.adversarial.ways = ["typos"]', "tasks.games.adversarial.ways", "none can be altered"),
        (
            'reward_service.scorers.answer.kind = "exact"\ntasks.sums.scorer = "answer"\n'
            'learner.constraint.cost = "safe"',
            "learner.constraint.cost",
            "no reward of answer has a part 'safe'",
        ),
        ('tasks.sums.adversarial.paraphrase = "words"', "tasks.sums.adversarial.paraphrase", "is not a dotted path"),
    ],
)
def test_a_wrong_setting_of_a_task_is_named(several: Path, line: str, where: str, what: str) -> None:
    found_where, found_what = refused(several, line)
    assert found_where == where
    assert what in found_what


def test_demonstrations_are_needed_for_at_least_one_task(several: Path) -> None:
    load_run_config(several, ['run.stages = ["sft", "ppo"]'])
    several.write_text(TASKS.replace('builder = "task:sums"', 'prompts = "x.parquet"'))
    assert refused(several, 'run.stages = ["sft", "ppo"]') == ("tasks.sums.sft", "stage sft needs it (or a builder)")


def test_only_scorers_that_a_task_uses_are_its_functions(several: Path) -> None:
    scorers = {
        "short": '{ kind = "function", path = "task:short" }',
        "other": '{ kind = "function", path = "task:other" }',
        "both": '{ kind = "composite", parts = { short = 1, rude = 1 } }',
        "rude": '{ kind = "forbidden", function = "task:rude" }',
    }
    lines = [f"reward_service.scorers.{name} = {scorer}" for name, scorer in scorers.items()]
    config = load_run_config(several, [*lines, 'tasks.sums.scorer = "both"'])
    assert scorer_paths(config, "sums") == {
        "reward_service.scorers.short.path": "task:short",
        "reward_service.scorers.rude.function": "task:rude",
    }
    assert scorer_paths(config, "games") == {}
    assert scorer_paths(load_run_config(several, lines), "sums") == {"tasks.sums.scorer": "task:score"}
