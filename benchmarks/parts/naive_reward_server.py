"""Serve rewards as common reward servers do, as a baseline: one process, one blocking request at a time, no limits.

`python -m benchmarks.parts.naive_reward_server FOLDER PORT`. Model and arithmetic are those of Antiphon's scorer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request

from cluster.scoring import Score, ScoreRequest
from reward_service.scorers.reward_model import RewardModelScorer


def main(folder: Path, port: int) -> None:
    """Serve `POST /get_reward` until killed."""
    torch.set_num_threads(1)
    scorer, app = RewardModelScorer(folder), FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, Any]:
        body = await request.json()
        items = [ScoreRequest(str(i), "", query) for i, query in enumerate(body["query"])]
        rewards = [outcome.reward for outcome in scorer.score_batch(items) if isinstance(outcome, Score)]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
