"""The model of the PyTorch project as a plain eager loop over time, with its parameters' names.

`load_pytorch_weights` loads its saved ``state_dict``. Import this module only where torch is
installed. Measure on an idle machine: torch's threads busy-wait for each other, and take ten to
fifty times as long where other programs use the cores.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.measure import process_peak
from simplernn_jax.config import Config


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


def torch_step(config: Config, tokens: np.ndarray, targets: np.ndarray) -> Callable[[], float]:
    """One step of Adam per call, on a GPU if torch sees one; each call returns the loss in nats.

    Args:
      config: of a plain model with one head.
      tokens: ``[B, T]`` int32.
      targets: ``[B, T]`` int32.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = config.model
    model = LoopModel(
        sizes.vocab_size, sizes.num_layers, sizes.hidden_dim, sizes.key_dim, sizes.value_dim
    ).to(device)
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
    )
    inputs, outputs = (
        torch.from_numpy(ids.astype(np.int64)).to(device) for ids in (tokens, targets)
    )

    def step() -> float:
        optimizer.zero_grad()
        logits = model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), outputs.flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())  # waits for the GPU

    return step


def torch_peak(work: Callable[[], Any]) -> float | None:
    """Peak memory of `work` over the memory held before it, on the GPU or of this process."""
    if not torch.cuda.is_available():
        return process_peak(work)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before
