from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.evaluation import evaluate
from deploy.runtime import pauses


async def test_the_evaluation_reports_a_pause_for_rewards_and_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing: list[str | None] = [None, "8 rewards (held-out-0 to held-out-7): down", None]
    notes: list[str] = []
    back = asyncio.Event()

    def note(text: str) -> None:
        notes.append(text)
        if text.startswith("rewards are back"):
            back.set()

    async def evaluated(*arguments: object) -> dict[str, object]:
        await back.wait()
        return {}

    session = SimpleNamespace(
        missing_rewards=lambda: missing.pop(0) if missing else None,
        view=SimpleNamespace(note=note, evaluated=lambda *results, **stage: None),
        config=object(),
        run=SimpleNamespace(path=Path(), summary=lambda: {"evaluation": {"after": {}}}),
    )
    monkeypatch.setattr(pauses, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(evaluate, "_evaluate_all", evaluated)
    monkeypatch.setattr(evaluate, "trained_policies", lambda config, path: (None, Path("policy"), "ppo"))
    await evaluate.evaluate(session)  # type: ignore[arg-type]
    assert notes == ["paused: waiting for 8 rewards (held-out-0 to held-out-7): down", "rewards are back after 0 s"]
