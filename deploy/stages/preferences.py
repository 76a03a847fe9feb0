"""The preferences stage: samples pairs of responses and has them labelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import user_code
from cluster.data.prompt_order import PromptOrder
from cluster.data.rendered_prompts import literals_column
from cluster.errors import AntiphonError
from cluster.files import replacing
from deploy.data.prompts import prompt_rows, rendered_rows
from deploy.run.artifacts import policy_path
from deploy.run.layout import HELD_OUT
from deploy.runtime.session import Session


async def collect_preferences(session: Session) -> None:
    """Sample pairs from the SFT policy, label them, and write `preferences.parquet` with TRL's columns."""
    config, run = session.config, session.run
    settings = config.preferences
    num = settings.num_pairs + settings.num_held_out_pairs
    session.view.stage("preferences", num)
    if settings.annotator is None:
        raise AntiphonError("preferences.annotator", "no function labels the pairs (set it, or data.preferences)")
    annotate = user_code.load(settings.annotator, "preferences.annotator")
    rows = await prompt_rows(session, "prompts", altered_share=config.data.adversarial_share)
    order = PromptOrder(rows, config.run.seed, shuffle=config.data.shuffle)
    drawn = await rendered_rows(session, [dict(order.row(i)) for i in range(num)])
    prompts = [row["prompt"] for row in drawn]
    pairs = await session.sample(
        prompts,
        policy_path(config, run.path),
        num=2,
        seed=f"{config.run.seed}-preferences",
        progress=lambda num_done: session.view.step({"step": num_done}),
    )
    first, second = ([pair[k].text for pair in pairs] for k in (0, 1))
    labels = annotate(prompts, first, second, seed=config.run.seed)
    _write_pairs(session, prompts, first, second, labels)


def _write_pairs(
    session: Session, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], labels: Sequence[int]
) -> None:
    settings, path = session.config.preferences, session.run.path
    if len(labels) != len(prompts) or not set(labels) <= {0, 1}:
        raise AntiphonError(
            "preferences.annotator",
            f"gave {len(labels)} labels for {len(prompts)} pairs, or not 0/1",
        )
    chosen = [b if label else a for a, b, label in zip(first, second, labels, strict=True)]
    rejected = [a if label else b for a, b, label in zip(first, second, labels, strict=True)]
    columns = {"prompt": [str(prompt) for prompt in prompts], "chosen": chosen, "rejected": rejected}
    table = pa.table({**columns, **literals_column(prompts)})
    session.run.update_summary({"reward_model.num_pairs": settings.num_pairs})
    if settings.oracle and settings.num_held_out_pairs:
        held_out = table.slice(settings.num_pairs).to_pydict()
        ceiling = _oracle_accuracy(user_code.load(settings.oracle, "preferences.oracle"), held_out)
        session.run.update_summary({"reward_model.noise_ceiling": ceiling})
        session.view.note(f"preferences: the oracle disagrees with {1 - ceiling:.1%} of the labels")
    parts = {HELD_OUT: table.slice(settings.num_pairs), "preferences.parquet": table.slice(0, settings.num_pairs)}
    for name, part in parts.items():
        with replacing(path / name) as partial:
            pq.write_table(part, partial)


def _oracle_accuracy(oracle: Callable[..., list[float]], pairs: dict[str, list[str]]) -> float:
    """Return the share of labels that agree with the oracle's scores; a tie counts one half."""
    chosen = oracle(pairs["prompt"], pairs["chosen"])
    rejected = oracle(pairs["prompt"], pairs["rejected"])
    agreed = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)]
    return sum(agreed) / len(agreed)
