"""`python -m benchmarks.tasks.peak_memory MODEL TOKENS CHUNK`: peak memory of log-probabilities and their gradient."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from learner.model.actor_critic import ActorCritic, ModelSettings


def main(path: Path, num_tokens: int, chunk: int) -> None:
    """Print the peak beyond what there was before, in bytes."""
    torch.set_num_threads(1)
    model = ActorCritic(ModelSettings(path, "float32", "none", 1.0, logprob_chunk_tokens=chunk))
    width = num_tokens // 8 + 1
    token_ids = torch.randint(model.policy.config.vocab_size, (8, width))
    mask = torch.ones(8, width, dtype=torch.bool)
    mask[:, 0] = False
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    outputs = model(token_ids, mask, [width] * 8)
    (outputs.logprobs.sum() + outputs.entropy.sum()).backward()
    print(json.dumps({"peak_bytes": _status_bytes("VmHWM") - before}))


def _status_bytes(name: str) -> int:
    """A figure of this process as Linux keeps it; the peak counts from when it was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
