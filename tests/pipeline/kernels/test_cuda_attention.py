"""Attention of recorded steps is that of steps one by one."""

import pytest
import torch

from pipeline.kernels.base import HeadShape
from pipeline.kernels.cuda_graphs import DecodeAttention
from pipeline.kernels.torch_attention import TorchAttention
from pipeline.protocol.batch import Segment


@pytest.mark.parametrize("window", [0, 3])
def test_recorded_attention_gives_sinks_their_share(window):
    """As one row after another, which is held against transformers."""
    generator = torch.Generator().manual_seed(0)
    shape, sinks = HeadShape(4, 2, 16, window), torch.randn(4, generator=generator)
    caches = [[torch.zeros(2, 2, 8, 16) for _ in range(2)] for _ in range(2)]
    for position in range(6):
        qkv = torch.randn(1, shape.qkv_width, generator=generator)
        plain = TorchAttention([Segment(1, position, 1)], shape)
        graph = DecodeAttention(torch.tensor([1]), torch.tensor([position]), 8, shape)
        found, expected = (
            attention(qkv, *cache, torch.empty(1, 64), sinks)
            for attention, cache in zip((graph, plain), caches, strict=True)
        )
        assert (found - expected).abs().max() <= 1e-6
