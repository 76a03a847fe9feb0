"""The SFT stage: supervised fine-tuning on the tasks' demonstrations."""

from __future__ import annotations

from cluster.data.datasets import Source
from deploy.run.artifacts import data_path, model_path
from deploy.runtime.session import Session
from deploy.stages.supervised import StartLearners, Supervised, start_learners, train


async def run_sft(session: Session, *, start: StartLearners = start_learners) -> None:
    """Train on the demonstrations of all tasks, mixed by their weights; writes `sft/`."""
    config, run = session.config, session.run
    session.view.stage("sft", 0)
    data = [
        Source(data_path(config, run.path, "sft", name), task.weight)
        for name, task in config.by_task().items()
        if task.sft or task.builder
    ]
    model, output = model_path(config, run.path), run.path / "sft"
    result = await train(session, Supervised("sft", "sft", model=model, data=data, output=output), start=start)
    run.update_summary({f"sft.{name}": value for name, value in result.items()})
    if "best_step" in result:
        session.view.note(f"sft: held-out loss {result['held_out_loss']:.4f} at step {result['best_step']:,.0f}, kept")
