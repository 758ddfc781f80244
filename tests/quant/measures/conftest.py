"""A sequence model of which everything is known, and what the measures share in tests."""

import pytest
import torch
from torch import nn


class Softmax(nn.Module):
    """Next-token logits ``head(embed(token))``: softmax regression in the head, whose curvature has a closed form."""

    def __init__(self, vocabulary=6, width=4):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


@pytest.fixture
def softmax():
    return Softmax()


@pytest.fixture
def own_logits():
    """``logits`` of a module of one's own."""
    return lambda model, input_ids: model(input_ids)
