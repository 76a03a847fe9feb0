"""Make a tiny chat model: a token per character, a beginning-of-sequence token, and a chat template."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "[user]", "[assistant]", "[system]")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Return a character tokenizer that puts the beginning-of-sequence token before a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *string.ascii_letters, *string.digits, *" .,:!?\n"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    special = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


def prefer_the_first(prompts: list[str], first: list[str], second: list[str], *, seed: int) -> list[int]:
    """Label every pair alike, as an annotator of the run file."""
    return [0] * len(prompts)


def write_chat_model(path: Path, *, template: str | None = TEMPLATE, hidden_size: int = 32) -> Path:
    """Write a random two-layer Llama with a context of 128 tokens, and the tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(template)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=2,
            )
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
