"""A tiny Llama in a Hugging Face folder, its log-probabilities by transformers, and its manifests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.weights.manifest import Manifest, Probe

VOCAB_SIZE = 48
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
EOS = 1
PROBE_PROMPTS = (tuple(range(4, 36)), (9, 8, 7, 6, 5, 40, 41, 42))


def build_folder(folder: Path, *, tied: bool) -> Path:
    """Save a random model (2 layers, 2 heads of 32) with a tokenizer of the words `t4` to `t47`."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=2,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = [*SPECIAL, *(f"t{i}" for i in range(len(SPECIAL), VOCAB_SIZE))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def load_model(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def checkpoint(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights in checkpoint form: a tied head has no tensor."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def after_one_step(model: Any, learning_rate: float) -> Any:
    """Return a copy of the model after one AdamW step on a fixed batch."""
    stepped = copy.deepcopy(model)
    stepped.tie_weights()
    optimizer = torch.optim.AdamW(stepped.parameters(), lr=learning_rate, weight_decay=0.0)
    tokens = torch.randint(0, VOCAB_SIZE, (8, 24), generator=torch.Generator().manual_seed(3))
    stepped(tokens, labels=tokens).loss.backward()
    optimizer.step()
    return stepped


@torch.no_grad()
def logprobs(model: Any, sequence: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Return the log-probability of each token but the first given its prefix, by transformers."""
    scores = (model(torch.tensor([list(sequence)])).logits / temperature).log_softmax(-1)
    targets = torch.tensor(list(sequence[1:]))[:, None]
    found: list[float] = scores[0, :-1].gather(-1, targets)[:, 0].tolist()
    return found


def probe(model: Any) -> Probe:
    return [logprobs(model, prompt) for prompt in PROBE_PROMPTS]


def manifest(version: int, model: Any, previous: Any | None) -> Manifest:
    """Return the manifest of a version, without references to tensors."""
    return Manifest(version, "first", (), PROBE_PROMPTS, probe(model), previous and probe(previous))
