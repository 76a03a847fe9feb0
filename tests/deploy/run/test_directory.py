"""Test the run directory: opening, locking, finished stages, and resuming."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import InputError
from deploy.config.load import load_run_config
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.open import open_run, read_target, require_run, require_same_settings
from deploy.run.stages import checkpoint_step, require_stages

TINY = '[run]\nstages = ["sft", "ppo"]\n[model]\nbuilder = "task:build"\n[data]\nbuilder = "task:data"\n'


LINES = ['run.name = "tiny"', "learner.num_steps = 20"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(TINY)
    return load_run_config(Path("run.toml"), LINES)


@pytest.fixture
def path(config: RunConfig) -> Path:
    return Path("runs/tiny").absolute()


def finish_ppo(path: Path, step: int) -> None:
    (path / "checkpoints" / "ppo" / f"step-{step:06d}").mkdir(parents=True)
    (path / "policy").mkdir(exist_ok=True)
    (path / "policy" / "config.json").write_text("{}")


def test_a_run_directory_is_found_again_with_its_settings(config: RunConfig, path: Path) -> None:
    with open_run(config, path):
        pass
    assert read_target(path) == (config, path)
    overrides = ["learner.num_steps = 20"]
    assert read_target(Path("run.toml"), overrides, name="tiny") == (config, path)


def test_runs_of_one_name_have_different_names_on_ray(config: RunConfig, path: Path) -> None:
    names = set()
    for folder in (path, path.parent / "other" / "tiny"):
        with open_run(config, folder) as run:
            names.add(run.name_on_ray("tiny"))
        with open_run(config, folder, fresh=True) as run:
            names.add(run.name_on_ray("tiny"))
        assert RunDirectory(folder).name_on_ray("tiny") in names
    shutil.copytree(path, path.parent / "copied")
    names.add(RunDirectory(path.parent / "copied").name_on_ray("tiny"))
    assert len(names) == 3
    assert all(name.startswith("tiny-") for name in names)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        read_target(tmp_path)
    with pytest.raises(InputError, match="no such run directory"):
        require_run(tmp_path / "none")


def test_a_name_for_a_run_directory_is_refused(config: RunConfig, path: Path) -> None:
    with open_run(config, path):
        pass
    with pytest.raises(InputError, match=r"--name: .* is a run directory already"):
        read_target(path, name="other")


def test_changed_settings_are_named_and_nothing_is_changed(config: RunConfig, path: Path) -> None:
    with open_run(config, path):
        pass
    before = (path / "config.toml").read_text()
    lines = ["learner.clip = 0.1", "learner.num_steps = 10", 'preferences.annotator = "task:judge"']
    changed = load_run_config(Path("run.toml"), lines)
    with pytest.raises(InputError) as refusal, open_run(changed, path):
        pass
    assert refusal.value.where == str(path)
    assert "learner.num_steps (was 20, now 10), preferences.annotator" in refusal.value.what
    assert 'preferences.annotator (was unset, now "task:judge") may not change' in refusal.value.what
    assert "learner.clip (was 0.2, now 0.1) may change with --allow-changes" in refusal.value.what
    assert (path / "config.toml").read_text() == before


def keep_answers(path: Path) -> None:
    (path / "evaluation").mkdir()
    (path / "evaluation" / "after.parquet").touch()


def test_run_with_more_ppo_steps_continues_and_is_evaluated_again(config: RunConfig, path: Path) -> None:
    with open_run(config, path) as run:
        finish_ppo(path, 20)
        (path / "sft").mkdir()
        (path / "sft" / "config.json").write_text("{}")
        run.update_summary({"evaluation.after.oracle": 4.0, "num_trained": 160})
    longer = load_run_config(Path("run.toml"), ['run.name = "tiny"', "learner.num_steps = 30"])
    with open_run(longer, path) as run:
        done = [run.is_done(stage, longer) for stage in ("sft", "ppo", "evaluation")]
        assert done == [True, False, False]
        assert run.newest_checkpoint("ppo") == path / "checkpoints" / "ppo" / "step-000020"
        assert run.summary() == {"num_trained": 160}
        finish_ppo(path, 30)
        run.update_summary({"evaluation.after.oracle": 4.5})
        keep_answers(path)
    assert read_target(path)[0].learner.num_steps == 30
    with open_run(longer, path) as run:
        assert run.is_done("ppo", longer)
        assert run.is_done("evaluation", longer)
    with pytest.raises(InputError, match=r"learner.num_steps \(was 30, now 20\)"), open_run(config, path):
        pass


def test_recorded_settings_change_if_allowed_and_forget_the_best(config: RunConfig, path: Path) -> None:
    with open_run(config, path) as run:
        run.update_summary({"held_out.objective": 1.0, "num_trained": 160})
    slower = load_run_config(Path("run.toml"), [*LINES, "learner.learning_rate = 1e-6"])
    with pytest.raises(InputError, match="add --allow-changes"), open_run(slower, path):
        pass
    with open_run(slower, path, allow_changes=True) as run:
        assert run.summary() == {"num_trained": 160}
    assert read_target(path)[0].learner.learning_rate == 1e-6


@pytest.mark.parametrize("line", ['data.evaluation = "other.jsonl"', "evaluation.num_prompts_during = 8"])
def test_the_best_is_not_compared_over_other_held_out_prompts(config: RunConfig, path: Path, line: str) -> None:
    with open_run(config, path) as run:
        run.update_summary({"held_out.objective": 1.0})
    with open_run(load_run_config(Path("run.toml"), [*LINES, line]), path) as run:
        assert run.summary() == {}


def test_timeouts_and_numbers_of_actors_change_at_any_time(config: RunConfig, path: Path) -> None:
    with open_run(config, path):
        pass
    lines = [*LINES, "rollout_actors.num_actors = 2", "learner.step_timeout_s = 60.0"]
    with open_run(load_run_config(Path("run.toml"), lines), path):
        assert read_target(path)[0].rollout_actors.num_actors == 2


def test_altered_prompts_may_change_unless_they_are_trained_on(config: RunConfig, path: Path) -> None:
    with open_run(config, path) as run:
        run.update_summary({"evaluation.after.oracle": 4.0})
    lines = [*LINES, 'adversarial.ways = ["typos"]']
    with open_run(load_run_config(Path("run.toml"), lines), path) as run:
        assert run.summary() == {}, "the policies are judged again"
    trained_on = load_run_config(Path("run.toml"), [*lines, "data.adversarial_share = 0.5"])
    with pytest.raises(InputError, match=r"data.adversarial_share \(was 0.0, now 0.5\)"), open_run(trained_on, path):
        pass
    with open_run(trained_on, path, fresh=True):
        pass
    other = [*LINES, 'adversarial.ways = ["injection"]', "data.adversarial_share = 0.5"]
    with (
        pytest.raises(InputError, match=r"adversarial.ways"),
        open_run(load_run_config(Path("run.toml"), other), path),
    ):
        pass


def test_only_the_sections_that_are_named_may_change(config: RunConfig, path: Path) -> None:
    with open_run(config, path):
        pass
    smoothed = load_run_config(Path("run.toml"), [*LINES, "reward_model.label_smoothing = 0.1"])
    with pytest.raises(InputError, match=r"reward_model\.label_smoothing"), open_run(smoothed, path):
        pass
    with open_run(smoothed, path, free=["reward_model"]):
        pass
    assert read_target(path)[0].reward_model.label_smoothing == 0.1


def test_fresh_deletes_the_run_and_accepts_other_settings(config: RunConfig, path: Path) -> None:
    with open_run(config, path):
        finish_ppo(path, 20)
    changed = load_run_config(Path("run.toml"), ["learner.num_steps = 30"])
    with open_run(changed, path, fresh=True) as run:
        assert not run.is_done("ppo", changed)
        assert sorted(child.name for child in path.iterdir()) == [".id", ".lock", "config.toml"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_never_deleted_or_written(config: RunConfig, path: Path, fresh: bool) -> None:
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a run directory"), open_run(config, path, fresh=fresh):
        pass
    assert [child.name for child in path.iterdir()] == ["thesis.txt"]


@pytest.mark.process
@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_process_is_refused_with_the_pid_of_the_first(config: RunConfig, path: Path, fresh: bool) -> None:
    code = (
        "import sys; from pathlib import Path; from deploy.run.open import *\n"
        "with open_run(read_target(Path('runs/tiny'))[0], Path('runs/tiny').absolute()):\n"
        "    print('open', flush=True); sys.stdin.read()\n"
    )
    with open_run(config, path):
        pass
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match=rf"another process is using this run \(pid {other.pid} on "):
            with open_run(config, path, fresh=fresh):
                pass
        assert (path / "config.toml").exists()
    with open_run(config, path, fresh=fresh):
        pass


def test_status_and_summary_change_only_what_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.update_status(stage="sft", step=3)
    run.update_status(step=4)
    stored = json.loads((tmp_path / "status.json").read_text())
    assert stored == {"state": "RUNNING", "stage": "sft", "step": 4, "ray_address": None, "error": None}
    run.update_summary({"evaluation.before.oracle": 0.1, "num_void": 0})
    run.update_summary({"evaluation.before.kl_nats": 0.0})
    assert run.summary() == {"evaluation": {"before": {"oracle": 0.1, "kl_nats": 0.0}}, "num_void": 0}


def test_a_run_that_never_started_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run was started here"):
        RunDirectory(tmp_path).status()


def test_stages_are_done_if_their_artifacts_exist(config: RunConfig, path: Path) -> None:
    run = RunDirectory(path)
    stages = ("sft", "preferences", "dpo", "reward_model", "ppo", "evaluation")
    assert not any(run.is_done(stage, config) for stage in stages)
    for folder in ("sft", "dpo", "reward_model"):
        (path / folder).mkdir(parents=True)
        (path / folder / "config.json").write_text("{}")
    (path / "preferences.parquet").touch()
    finish_ppo(path, 10)
    assert not run.is_done("ppo", config)
    finish_ppo(path, 20)
    run.update_summary({"evaluation.before.oracle": 0.0})
    assert not run.is_done("evaluation", config)
    run.update_summary({"evaluation.after.oracle": 4.0})
    assert not run.is_done("evaluation", config), "the answers of a run before they were kept are not there"
    keep_answers(path)
    assert all(run.is_done(stage, config) for stage in stages)


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    run, folder = RunDirectory(tmp_path), tmp_path / "checkpoints" / "ppo"
    for name in ("step-000010", "step-000020", "step-000030", "step-000040", ".step-000050"):
        (folder / name).mkdir(parents=True)
    assert run.newest_checkpoint("ppo") == folder / "step-000040"
    assert run.newest_checkpoint("sft") is None
    assert run.best_checkpoint("ppo") is None
    run.keep_checkpoints("ppo", newest=3, best=folder / "step-000010")
    assert run.best_checkpoint("ppo") == folder / "step-000010"
    run.keep_checkpoints("ppo", newest=2)
    assert [path.name for path in run.checkpoints("ppo")] == ["step-000010", "step-000030", "step-000040"]
    run.keep_checkpoints("ppo", newest=1, best=folder / "step-000030")
    assert [path.name for path in run.checkpoints("ppo")] == ["step-000030", "step-000040"]


def test_periodic_checkpoints_are_kept_if_requested(tmp_path: Path) -> None:
    run, folder = RunDirectory(tmp_path), tmp_path / "checkpoints" / "ppo"
    for step in range(5, 45, 5):
        (folder / f"step-{step:06d}").mkdir(parents=True)
        run.keep_checkpoints("ppo", newest=2, best=folder / "step-000005", every_steps=10)
    assert [checkpoint_step(path) for path in run.checkpoints("ppo")] == [5, 10, 20, 30, 35, 40]


def test_resuming_drops_the_metrics_of_repeated_steps(config: RunConfig, path: Path) -> None:
    with open_run(config, path) as run:
        (path / "checkpoints" / "sft" / "step-000002").mkdir(parents=True)
        rows = [{"stage": "sft", "step": step} for step in (1, 2, 3)]
        rows += [{"stage": "ppo", "step": step, "num_episodes": 8 * step} for step in (1, 2)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "metrics.jsonl").write_text(lines + '{"stage": "ppo", "st')
    with open_run(config, path) as run:
        assert [(row["stage"], row["step"]) for row in run.metrics()] == [
            *(("sft", 1), ("sft", 2)),
            *(("ppo", 1), ("ppo", 2)),
        ]
        assert run.last_ppo_step()["num_episodes"] == 16


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("ppo", "sft: not trained (run antiphon sft)"),
        ("evaluation", "sft: not trained (run antiphon sft)"),
        ("reward_model", "sft: not trained (run antiphon sft)"),
    ],
)
def test_a_stage_names_the_missing_one_it_builds_on(config: RunConfig, path: Path, stage: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        require_stages(config, RunDirectory(path), [stage])
    assert str(refusal.value) == message


def test_a_scorer_that_is_the_reward_model_needs_one(config: RunConfig, path: Path) -> None:
    with pytest.raises(InputError, match=r"reward_model: not trained \(run antiphon reward-model\)"):
        require_stages(config, RunDirectory(path), ["sft", "ppo"])


def test_a_run_without_ppo_steps_has_no_last_one(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).last_ppo_step() == {}


def test_evaluation_is_repeated_if_its_settings_change(path: Path, config: RunConfig) -> None:
    tasks = '[tasks.sums]\nbuilder = "task:data"\nscorer = "task:score"\n'
    Path("run.toml").write_text(TINY.partition("[data]")[0] + tasks)
    config = load_run_config(Path("run.toml"), LINES)
    with open_run(config, path) as run:
        run.update_summary({"evaluation.after.reward": 1.0})
    other = load_run_config(Path("run.toml"), [*LINES, 'tasks.sums.metrics = "task:measure"'])
    with open_run(other, path) as run:
        assert "evaluation" not in run.summary()
    harder = load_run_config(Path("run.toml"), [*LINES, 'tasks.sums.adversarial.ways = ["typos"]'])
    with open_run(harder, path):
        pass
    lines = [*LINES, 'tasks.sums.adversarial.ways = ["injection"]', "tasks.sums.adversarial_share = 0.5"]
    trained_on = load_run_config(Path("run.toml"), lines)
    with pytest.raises(InputError, match=r"tasks\.sums\.adversarial\.ways .*tasks\.sums\.adversarial_share"):
        require_same_settings(trained_on, path)
    heavier = load_run_config(Path("run.toml"), [*LINES, "tasks.sums.weight = 2.0"])
    with pytest.raises(InputError, match=r"tasks\.sums\.weight \(was 1\.0, now 2\.0\)"), open_run(heavier, path):
        pass


def test_the_summary_keeps_names_of_metrics_with_dots(config: RunConfig, path: Path) -> None:
    with open_run(config, path) as run:
        run.update_summary({("evaluation", "after", name): value for name, value in (("acc", 0.5), ("acc.easy", 0.9))})
        run.update_summary({("evaluation", "after", "pass@0.5"): float("nan")})
        run.update_summary({"num_void": 0})
        after = {"acc": 0.5, "acc.easy": 0.9, "pass@0.5": None}
        assert run.summary() == {"evaluation": {"after": after}, "num_void": 0}
