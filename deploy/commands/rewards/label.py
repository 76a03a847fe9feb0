"""`antiphon label`: the command-line options; `labelling` samples pairs and serves the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.arguments import Run
from deploy.run.layout import FEEDBACK
from deploy.run.open import require_run


def label(
    run: Run,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond loopback, ANTIPHON_TOKEN must be set.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8001,
    num_pairs: Annotated[
        int, typer.Option(min=1, help="Pairs to label for this policy; missing ones are sampled first.")
    ] = 64,
    annotators_per_pair: Annotated[
        float, typer.Option(min=1, help="Mean number of annotators; 1.1 shows every tenth pair to a second person.")
    ] = 1.1,
    random_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of pairs drawn at random; the others are those with uncertain rewards."),
    ] = 0.2,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the preferences collected so far (Parquet) and exit.")
    ] = None,
) -> None:
    """Serve a page on which people choose between responses of a run's newest policy.

    Prints "listening on URL" when ready. The choices are stored in RUN/feedback.sqlite.

    [dim]antiphon label runs/reviews[/dim]
    """
    directory = require_run(run)
    if export is not None:
        _export(directory.path / FEEDBACK, export)
        return
    from deploy.commands.rewards.labelling import collect_feedback

    collect_feedback(
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
