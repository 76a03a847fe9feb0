"""What only a GPU runs: variable-length flash attention against plain attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from learner.packing import make_pack, packed_attention


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_attention_keeps_packed_sequences_apart_as_plain_attention_of_each_does() -> None:
    lengths, device = [5, 64, 1, 30], torch.device("cuda")
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, 2, 2)]
    query, key, value = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, pack=make_pack(lengths, device))
    start = 0
    for length in lengths:
        part = [tensor[:, :, start : start + length] for tensor in (query, key, value)]
        expected = scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(found[:, start : start + length], expected, atol=2e-2, rtol=2e-2)
        start += length
