"""Train letters with TRL 1.12.0's PPOTrainer in a separate virtual environment. Prints one JSON line per update.

`benchmarks.peer.trl` starts it. It imports nothing of this project, and trains the same model folder as Antiphon.
"""

import argparse
import json
import os
import random
import sys
import time
from types import SimpleNamespace
from typing import Any

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

PROMPT_LETTERS, RESPONSE_LENGTH, EPISODES_PER_UPDATE = "bcdefgh", 16, 64


class CountA(torch.nn.Module):
    """Reward model for TRL: the number of a in the response so far over the response length."""

    base_model_prefix = "backbone"

    def __init__(self, a_id: int) -> None:
        super().__init__()
        self.a_id = a_id
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def backbone(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[(input_ids == self.a_id).float().unsqueeze(-1)])

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.cumsum(dim=1) / RESPONSE_LENGTH


class Report(TrainerCallback):
    """Prints one line per update: episodes so far, mean score, seconds since training began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "objective/scores" in logs:
            row = {
                "num_episodes": state.episode,
                "reward_mean": logs["objective/scores"],
                "time_s": time.monotonic() - self.started,
            }
            print(json.dumps(row), file=sys.__stdout__, flush=True)


def prompts(tokenizer: Any, num: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    texts = ["".join(rng.choices(PROMPT_LETTERS, k=8)) + ":" for _ in range(num)]
    return Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--episodes", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    sys.stdout = sys.stderr
    torch.manual_seed(arguments.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(arguments.model) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1)
    torch.nn.init.zeros_(value.score.weight)
    config = PPOConfig(
        output_dir=arguments.output,
        seed=arguments.seed,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=EPISODES_PER_UPDATE,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=4,
        total_episodes=arguments.episodes,
        local_rollout_forward_batch_size=EPISODES_PER_UPDATE,
        response_length=RESPONSE_LENGTH,
        temperature=1.0,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        kl_coef=0.01,
        vf_coef=0.5,
        cliprange=0.2,
        cliprange_value=0.2,
        gamma=1.0,
        lam=0.95,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=CountA(tokenizer.convert_tokens_to_ids("a")),
        value_model=value,
        train_dataset=prompts(tokenizer, 4096, arguments.seed),
        eval_dataset=prompts(tokenizer, 64, arguments.seed + 1),
        callbacks=[Report()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
