"""The model of the PyTorch project as a plain eager loop over time, with its parameters' names.

`load_pytorch_weights` loads its saved ``state_dict``. Measure on an idle machine: torch's threads
busy-wait for each other, and take ten to fifty times as long where other programs use the cores.
"""

from typing import Any

import torch

from simplernn_jax.config import Config

from .measure import Call
from .train_steps import random_batch


class LoopCell(torch.nn.Module):
    """One layer: the projections of all tokens in one matmul each, then one token at a time."""

    def __init__(self, hidden: int, key: int, value: int) -> None:
        super().__init__()
        self.query_proj = torch.nn.Linear(hidden, key)
        self.key_proj = torch.nn.Linear(hidden, key)
        self.value_proj = torch.nn.Linear(hidden, value)
        self.gate_proj = torch.nn.Linear(hidden, key)
        self.out_proj = torch.nn.Linear(value, hidden)

    def forward(self, x: Any) -> Any:
        """``[B, T, hidden]`` to the same shape, from a zero state."""
        q, v = self.query_proj(x), self.value_proj(x)
        k, gate = torch.sigmoid(self.key_proj(x)), torch.sigmoid(self.gate_proj(x))
        state = x.new_zeros(len(x), k.shape[-1], v.shape[-1])
        outputs = []
        for t in range(x.shape[1]):
            written = torch.einsum("bk,bv->bkv", k[:, t], v[:, t])
            state = gate[:, t, :, None] * state + written
            outputs.append(torch.einsum("bkv,bk->bv", state, q[:, t]))
        return self.out_proj(torch.stack(outputs, dim=1))


class LoopModel(torch.nn.Module):
    """Embedding, layers, head; equal to ``block="plain"``."""

    def __init__(self, vocab: int, layers: int, hidden: int, key: int, value: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, hidden)
        self.layers = torch.nn.ModuleList([LoopCell(hidden, key, value) for _ in range(layers)])
        self.lm_head = torch.nn.Linear(hidden, vocab)

    def forward(self, tokens: Any) -> Any:
        """``[B, T]`` token ids to ``[B, T, vocab]`` logits."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def torch_step(config: Config) -> Call:
    """One step of Adam per call, on a GPU if torch sees one; each call returns the loss in nats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes, settings = config.model, config.optimizer
    widths = (sizes.hidden_dim, sizes.key_dim, sizes.value_dim)
    model = LoopModel(sizes.vocab_size, sizes.num_layers, *widths).to(device)
    options = {"betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, **options)
    batch = random_batch(config)[:2]
    inputs, targets = (torch.from_numpy(ids).long().to(device) for ids in batch)

    def step() -> float:
        optimizer.zero_grad()
        logits = model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())  # waits for the GPU

    return step
