"""The model of the PyTorch project, one token after another, with its names of parameters."""

from typing import Any

import torch


class ReferenceCell(torch.nn.Module):
    def __init__(self, hidden: int, key: int, value: int) -> None:
        super().__init__()
        self.query_proj = torch.nn.Linear(hidden, key)
        self.key_proj = torch.nn.Linear(hidden, key)
        self.value_proj = torch.nn.Linear(hidden, value)
        self.gate_proj = torch.nn.Linear(hidden, key)
        self.out_proj = torch.nn.Linear(value, hidden)

    def forward(self, x: Any) -> Any:
        state = torch.zeros(1, self.key_proj.out_features, self.value_proj.out_features)
        outputs = []
        for x_t in x.unbind(dim=1):
            gate = torch.sigmoid(self.gate_proj(x_t))
            key = torch.sigmoid(self.key_proj(x_t))
            written = torch.einsum("bk,bv->bkv", key, self.value_proj(x_t))
            state = gate[:, :, None] * state + written
            outputs.append(torch.einsum("bkv,bk->bv", state, self.query_proj(x_t)))
        return self.out_proj(torch.stack(outputs, dim=1))


class ReferenceModel(torch.nn.Module):
    def __init__(self, vocab: int, layers: int, hidden: int, key: int, value: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, hidden)
        self.layers = torch.nn.ModuleList(
            [ReferenceCell(hidden, key, value) for _ in range(layers)]
        )
        self.lm_head = torch.nn.Linear(hidden, vocab)

    def forward(self, tokens: Any) -> Any:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)
