"""Make tiny chat models for the tasks: an untrained Llama, a tokenizer of whole words and a chat template.

Each task chooses words and sizes. Heads have size 32, the smallest that vLLM's attention on a CPU supports. There are
few layers because in vLLM on a CPU depth costs more than width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>")
PUNCTUATION = (".", ",", "?", "!", ":", ";")
"""Marks that are separate tokens. Decoding restores a response's text exactly if it uses only the first four."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<assistant>{{ m['content'] }}{{ eos_token }}"
    "{% else %}<user>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HEAD_SIZE = 32
INITIAL_DEVIATION = 0.1
"""Standard deviation of untrained weights. With the usual 0.02, models this narrow do not learn to use the prompt."""


def write_tiny_model(
    directory: Path,
    words: Iterable[str],
    *,
    seed: int,
    num_heads: int = 2,
    num_layers: int = 2,
    max_positions: int = 128,
) -> None:
    """Write an untrained fp32 model with its tokenizer and generation_config into the directory."""
    tokenizer = make_tokenizer(words)
    width = num_heads * HEAD_SIZE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        initializer_range=INITIAL_DEVIATION,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of these words and punctuation. The chat template adds BOS; the tokenizer adds nothing."""
    tokens = (*SPECIAL, *PUNCTUATION, *sorted(set(words)))
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,?!:;]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[USER, ASSISTANT],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast
