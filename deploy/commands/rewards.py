"""The commands around rewards: the service by itself, its tokens, the labelling page, and how good a reward model is.

As in `deploy.cli`, the work is imported only when it is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InputError
from deploy.commands.arguments import Lines, Name, Run, RunsDir, Target
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.layout import FEEDBACK
from deploy.run.open import read_target, require_run
from deploy.run.reward_models import published_folder
from deploy.run.stages import not_done
from reward_service.http.address import require_token
from reward_service.http.tokens import add_token, read_tokens, revoke_token, with_tokens

commands = typer.Typer()


@commands.command()
def serve_rewards(
    target: Target,
    host: Annotated[str, typer.Option(help="Beyond loopback, ANTIPHON_TOKEN must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    set_: Lines = None,
    runs_dir: RunsDir = None,
    name: Name = None,
) -> None:
    """Serve a run's rewards over HTTP, for anyone; prints "listening on URL" when ready.

    [dim]curl -d '{"prompts": ["..."], "responses": ["..."]}' http://127.0.0.1:8000/v1/rewards[/dim]
    """
    config, path = read_target(target, set_ or (), name=name, runs_dir=runs_dir)
    service = with_tokens(config.served(), path).model_copy(update={"host": host})
    require_token(service, os.environ.get("ANTIPHON_TOKEN"), "--host")
    reward_model = _reward_model(config, path)
    from deploy.commands.serve_rewards import serve_rewards as serve
    from deploy.run.artifacts import feedback_settings

    serve(
        config.served(),
        reward_model_path=reward_model,
        host=host,
        port=port,
        name=config.run.name,
        run_path=path,
        feedback=feedback_settings(config, RunDirectory(path)),
    )


@commands.command()
def token(
    run: Run,
    add: Annotated[str | None, typer.Option(metavar="NAME", help="Make a token and print it, this once.")] = None,
    revoke: Annotated[str | None, typer.Option(metavar="NAME", help="Refuse that token from now on.")] = None,
) -> None:
    """List, make and revoke the named tokens that a run's reward service and labelling page take.

    [dim]antiphon token runs/reviews --add ana[/dim]
    """
    config, path = read_target(run, ())
    tokens = with_tokens(config.reward_service, path).http.tokens
    assert tokens is not None
    if add is not None:
        print(add_token(tokens, add))
    if revoke is not None:
        revoke_token(tokens, revoke)
    if add is None and revoke is None:
        print("\n".join(read_tokens(tokens)) or "no tokens")


def _reward_model(config: RunConfig, path: Path) -> Path | None:
    """The reward model that the service needs, as it was published; None where it needs none."""
    if not config.served().needs_reward_model():
        return None
    folder = published_folder(path)
    if folder is None:
        raise not_done("reward_model")
    return folder


@commands.command()
def evaluate_rewards(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Pairs: prompt, chosen, rejected, perhaps subset.")],
    run: Annotated[Path | None, typer.Option(help="Judge the reward model of this run.")] = None,
    reward_model: Annotated[Path | None, typer.Option(help="Judge the reward model in this folder.")] = None,
    url: Annotated[str | None, typer.Option(help="Judge what serves rewards there (ANTIPHON_TOKEN).")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Which scorer of the service at --url, by name or version.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder whose chat template writes messages.")] = None,
    columns: Annotated[list[str] | None, typer.Option(help="What FILE calls a column: prompt=question.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A broken row is an error, not left out.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """How often a reward model prefers what was chosen, by subset: on RewardBench's form, JSON Lines or Parquet.

    [dim]antiphon evaluate-rewards pairs.jsonl --run runs/reviews[/dim]
    """
    if sum(given is not None for given in (run, reward_model, url)) != 1:
        raise InputError("evaluate-rewards", "give one of --run, --reward-model and --url")
    if scorer is not None and url is None:
        raise InputError("--scorer", "names a scorer of the service at --url, which is not given")
    if run is not None:
        reward_model = require_run(run).path / "reward_model"
        if not (reward_model / "config.json").exists():
            raise not_done("reward_model")
    from deploy.commands.evaluate_rewards import evaluate_rewards as judge
    from deploy.commands.evaluate_rewards import parse_columns

    named = parse_columns(columns or ())
    judge(
        file,
        reward_model=reward_model,
        url=url,
        scorer=scorer,
        tokenizer=tokenizer,
        columns=named,
        strict=strict,
        json_path=json_path,
    )


@commands.command()
def label(
    run: Run,
    host: Annotated[str, typer.Option(help="Beyond loopback, ANTIPHON_TOKEN must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    num_pairs: Annotated[
        int, typer.Option(min=1, help="Pairs of this policy there should be; what is missing is sampled.")
    ] = 64,
    annotators_per_pair: Annotated[
        float, typer.Option(min=1, help="In the mean: 1.1 asks a second person about every tenth pair.")
    ] = 1.1,
    random_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of pairs drawn by lot, not where the reward model is unsure.")
    ] = 0.2,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what people prefer so far (Parquet) and end.")
    ] = None,
) -> None:
    """Have people choose between responses of a run's newest policy, on a page in the browser.

    Prints "listening on URL" when ready. The choices are kept in RUN/feedback.sqlite.

    [dim]antiphon label runs/reviews[/dim]
    """
    directory = require_run(run)
    if export is not None:
        _export(directory.path / FEEDBACK, export)
        return
    from deploy.commands.label import label as ask

    ask(
        directory,
        host=host,
        port=port,
        num_pairs=num_pairs,
        annotators_per_pair=annotators_per_pair,
        random_share=random_share,
    )


def _export(store: Path, file: Path) -> None:
    from reward_service.feedback.store import export_preferences

    exported = export_preferences(store, file)
    left_out = f"{exported.num_ties:,} ties and {exported.num_skips:,} skips left out"
    print(f"{file}: {exported.num_preferences:,} preferences ({left_out})")
