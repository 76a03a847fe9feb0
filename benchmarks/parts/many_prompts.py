"""CPU seconds and memory that 1,000 and 200,000 prompts take of a start: texts and conversations, first and resumed.

`python -m benchmarks.parts.many_prompts RUN PROMPTS MODEL` is one start: it finds the prompts that fit, or takes them
from the run directory, and draws a step's prompts as the queue does. Every start is a process of its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, Row
from cluster.data.prompt_order import MixedPrompts, TaskPrompts
from deploy.run.prompt_store import load, made_of, save
from rollout_actors.prompt_screen import ready_rows

COUNTS = (1_000, 200_000)
MAX_PROMPT_TOKENS = 256
MEBIBYTE = 2**20
MORE_S, MORE_MIB = 10, 500
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def measure(folder: Path) -> list[Row]:
    """Measure all starts; the figures with an aim compare the two numbers of prompts."""
    model = folder / "model"
    _write_model(model)
    rows = []
    for kind in ("texts", "conversations"):
        found = {num: _starts(folder / f"{kind}-{num}", model, kind, num) for num in COUNTS}
        few, many = (found[num] for num in COUNTS)
        for how, before, after in zip(("first start", "resumed start"), few, many, strict=True):
            name = f"200,000 {kind}, {how}"
            rows += [
                Row(f"{name}: CPU seconds more than with 1,000", (after["s"] - before["s"],), "s", f"<= {MORE_S}"),
                Row(f"{name}: memory more", ((after["MiB"] - before["MiB"]),), "MiB", f"<= {MORE_MIB}"),
                Row(f"{name}: CPU seconds", (after["s"],), "s"),
                Row(f"{name}: peak memory", (after["MiB"],), "MiB"),
            ]
    return rows


def _write_model(folder: Path) -> None:
    """Write a byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _starts(run: Path, model: Path, kind: str, num: int) -> list[dict[str, float]]:
    """Return seconds and peak memory of a first and of a resumed start."""
    run.mkdir()
    path, draw = run / "prompts.jsonl", random.Random(0)
    with path.open("w") as lines:
        for number in range(num):
            text = f"Question {number}: " + " ".join(draw.choices(("how", "many", "apples", "are", "left", "?"), k=20))
            prompt: Any = text if kind == "texts" else [{"role": "user", "content": text}]
            lines.write(json.dumps({"prompt": prompt, "answer": number}) + "\n")
    command = [sys.executable, "-m", "benchmarks.parts.many_prompts", str(run), str(path), str(model)]
    outputs = (subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout for _ in range(2))
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def start(run: Path, path: Path, model: Path) -> dict[str, float]:
    """Find the prompts that fit, keep them, and draw the prompts of a step."""
    made = made_of(path, model, {"max_prompt_tokens": MAX_PROMPT_TOKENS})
    ready = load(run / "kept", made)
    if ready is None:
        ready = next(ready_rows(path, model, max_prompt_tokens=MAX_PROMPT_TOKENS))
        save(run / "kept", made, ready)
    order = MixedPrompts([TaskPrompts("task", ready.rows)], 0)
    drawn = [order.prompt(number).row for number in range(64)]
    assert len(drawn) == 64
    peak = next(line for line in _status() if line.startswith("VmHWM"))
    return {"s": time.process_time(), "MiB": int(peak.split()[1]) * 1024 / MEBIBYTE}


def _status() -> Iterator[str]:
    yield from Path("/proc/self/status").read_text().splitlines()


if __name__ == "__main__":
    print(json.dumps(start(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))))
