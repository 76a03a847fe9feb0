"""Write golden numbers of TRL's DPO, IPO and KTO losses, with gradients: `trl_preferences.py OUTPUT.json`.

Runs in the peer's environment (`make golden`) and imports nothing of this project.
TRL's own trainers compute the losses in float64, on logits that a stand-in for the model returns.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
import trl
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

VOCABULARY, NUM_ROWS, SEED = 7, 5, 0
BETAS = (0.1, 0.5)
WEIGHTS = (1.0, 1.33)


class Logits(torch.nn.Module):
    """Stands for a model: its logits follow from a random table."""

    is_gradient_checkpointing = False

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(
            scale * torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=GENERATOR)
        )

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Return logits [N, T, V] that depend on the token and on the mean of all tokens before it."""
        seen = torch.nn.functional.one_hot(input_ids, VOCABULARY).double().cumsum(1)
        counts = torch.arange(1, input_ids.shape[1] + 1, dtype=torch.float64)[None, :, None]
        return SimpleNamespace(logits=self.table[input_ids] + (seen / counts) @ self.table)


class Accelerator:
    """A group of one rank."""

    device = torch.device("cpu")

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


GENERATOR = torch.Generator().manual_seed(SEED)
POLICY, REFERENCE = Logits(1.0), Logits(0.7)


def tokens(low: int, high: int) -> list[int]:
    num = int(torch.randint(low, high, (), generator=GENERATOR))
    ids: list[int] = torch.randint(1, VOCABULARY, (num,), generator=GENERATOR).tolist()
    return ids


def trainer(kind: Any, **attributes: Any) -> Any:
    """Return a trainer without its constructor: only what its loss reads."""
    made = kind.__new__(kind)
    made.accelerator, made.model, made.ref_model = Accelerator(), POLICY, REFERENCE
    made.aux_loss_enabled, made.precompute_ref_logps, made._total_train_tokens = False, False, 0
    made._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    made.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def found(made: Any, batch: Any) -> dict[str, Any]:
    """Return loss, gradient of the policy's table, and metrics."""
    POLICY.zero_grad()
    loss = made._compute_loss(POLICY, dict(batch), return_outputs=False)
    loss.backward()
    kept = ("rewards/", "logps/", "kl")
    metrics = {key: values[0] for key, values in made._metrics["train"].items() if key.startswith(kept)}
    assert POLICY.table.grad is not None
    return {"loss": loss.item(), "gradient": POLICY.table.grad.tolist(), **metrics}


def main(output: Path) -> None:
    """Compute all vectors and write them."""
    pairs = [
        {"prompt_ids": tokens(1, 4), "chosen_ids": tokens(1, 6), "rejected_ids": tokens(1, 6)} for _ in range(NUM_ROWS)
    ]
    rows = [{"prompt_ids": tokens(1, 4), "completion_ids": tokens(1, 6), "label": i % 3 != 1} for i in range(NUM_ROWS)]
    shifted = [{**row, "KL_completion_ids": rows[i - 1]["completion_ids"]} for i, row in enumerate(rows)]
    pair_batch = DataCollatorForPreference(pad_token_id=0)(pairs)
    row_batch = DataCollatorForUnpairedPreference(pad_token_id=0)(shifted)
    outputs: dict[str, Any] = {}
    for beta in BETAS:
        for loss in ("sigmoid", "ipo"):
            settings = {"beta": beta, "loss_types": [loss], "loss_weights": [1.0], "label_smoothing": 0.0}
            made = trainer(DPOTrainer, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, **settings)
            outputs[f"{loss} beta={beta}"] = found(made, pair_batch)
        for weight in WEIGHTS:
            settings = {"beta": beta, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": weight}
            made = trainer(KTOTrainer, calculate_KL=True, use_liger_kernel=False, **settings)
            outputs[f"kto beta={beta} undesirable_weight={weight}"] = found(made, row_batch)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    about = "Logits of token t: table[token] + the mean of table over the tokens up to t. float64."
    tables = {"policy": POLICY.table.tolist(), "reference": REFERENCE.table.tolist()}
    vectors = {"about": about, "versions": versions, "tables": tables, "pairs": pairs, "rows": rows, "outputs": outputs}
    output.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
