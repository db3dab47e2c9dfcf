"""nanoGPT's architecture, an LSTM and a GRU in PyTorch, and their training.

The first is a transformer with learned positions, norms before attention and MLP, GELU, no biases,
and the embedding as head.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from simplernn_jax.data.batches import Batch
from simplernn_jax.data.evaluation_batches import Contexts, context_batches, evaluation_batches
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.training.evaluate import BATCH_TOKENS, MAX_BATCH_SIZE
from simplernn_jax.training.optimizer import learning_rate_schedule

from .trainers import Baseline, Trainer

STRIDES = 4
"""Contexts of attention that overlap a token; each scores the last of this many parts of it."""


class Block(nn.Module):
    """Causal attention, then an MLP four times as wide, each after its norm."""

    def __init__(self, baseline: Baseline) -> None:
        super().__init__()
        self.heads, self.dropout, width = baseline.heads, baseline.dropout, baseline.width
        self.norms = nn.ModuleList([nn.LayerNorm(width, bias=False) for _ in range(2)])
        self.qkv, self.mix = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Any) -> Any:
        """``[B, T, width]`` to the same shape."""
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + F.dropout(self.mix(seen.transpose(1, 2).flatten(2)), rate)
        return x + F.dropout(self.narrow(F.gelu(self.widen(self.norms[1](x)))), rate)


class GPT(nn.Module):
    """Transformer of a context of ``baseline.length`` tokens, initialized as GPT-2."""

    def __init__(self, baseline: Baseline, vocab: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(baseline.dropout)
        self.tokens = nn.Embedding(vocab, baseline.width)
        self.positions = nn.Embedding(baseline.length, baseline.width)
        self.blocks = nn.Sequential(*(Block(baseline) for _ in range(baseline.layers)))
        self.norm = nn.LayerNorm(baseline.width, bias=False)
        for name, values in self.named_parameters():
            if values.dim() == 2:
                ends_branch = name.endswith(("mix.weight", "narrow.weight"))
                std = 0.02 / math.sqrt(2 * baseline.layers) if ends_branch else 0.02
                nn.init.normal_(values, std=std)

    def forward(self, tokens: Any, carry: Any = None) -> Any:
        """``[B, T]`` token ids to ``[B, T, vocab]`` logits; there is no carry."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return F.linear(self.norm(self.blocks(self.dropout(x))), self.tokens.weight), None


class Recurrent(nn.Module):
    """``torch.nn.LSTM`` or ``GRU`` between embedding and head, and dropout around each layer."""

    def __init__(self, baseline: Baseline, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, baseline.width)
        self.dropout = nn.Dropout(baseline.dropout)
        kind, width, between = baseline.model.upper(), baseline.width, baseline.dropout
        between = between if baseline.layers > 1 else 0.0  # PyTorch warns otherwise
        make = getattr(nn, kind)
        self.layers = make(width, width, baseline.layers, batch_first=True, dropout=between)
        self.head = nn.Linear(baseline.width, vocab)

    def forward(self, tokens: Any, carry: Any = None) -> Any:
        """``[B, T]`` token ids to ``[B, T, vocab]`` logits, and the carry."""
        x, carry = self.layers(self.dropout(self.embedding(tokens)), carry)
        return self.head(self.dropout(x)), carry


class TorchTrainer(Trainer):
    """Training of one baseline; windows start from a zero state."""

    def __init__(
        self, baseline: Baseline, corpus: TokenizedCorpus, vocab: int, steps: int, seed: int
    ) -> None:
        super().__init__(corpus, baseline.data_config(), seed)
        torch.manual_seed(seed)
        schedule = baseline.schedule(steps)
        rates = learning_rate_schedule(schedule, schedule.warmup_steps, steps)(jnp.arange(steps))
        self._baseline, self._rates = baseline, iter(rates.tolist())
        make = GPT if baseline.model == "gpt" else Recurrent
        self._model = make(baseline, vocab)
        self._trained: Any = torch.compile(self._model) if baseline.is_compiled else self._model
        self.parameters = sum(values.numel() for values in self._model.parameters())
        matrices = [values for values in self._model.parameters() if values.dim() == 2]
        others = [values for values in self._model.parameters() if values.dim() != 2]
        decay = baseline.weight_decay
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))

    def take(self, steps: int) -> None:
        """See `Trainer.take`."""
        for _ in range(steps):
            rate = next(self._rates, 0.0)  # a trial may take more steps than its settings
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            batch = next(self._batches)
            logits, _ = self._trained(_ids(batch.tokens))
            targets = _ids(np.where(batch.loss_mask, batch.targets, -1))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()

    @torch.no_grad()
    def evaluate(self, limit_tokens: int = 0) -> float:
        """See `Trainer.evaluate`; attention sees overlapping contexts."""
        sizes = BATCH_TOKENS, MAX_BATCH_SIZE, self._pad_id, limit_tokens
        if self._baseline.model == "gpt":
            contexts = Contexts(self._baseline.length, max(1, self._baseline.length // STRIDES))
            batches = context_batches(self._held_out, contexts, *sizes)
        else:
            batches = evaluation_batches(self._held_out, *sizes)
        self._model.eval()
        total, count, carry = 0.0, 0, None
        for batch in batches:
            nats, carry = self._score(batch, carry)
            total, count = total + nats, count + int(np.sum(batch.loss_mask))
        self._model.train()
        return total / count

    def _score(self, batch: Batch, carry: Any) -> tuple[float, Any]:
        """Sum of the nats of a batch's predictions, and the carry; before the first it is None."""
        begins = np.diff(batch.segment_ids, axis=1, prepend=batch.segment_ids[:, :1]) != 0
        begins[:, 0] = batch.reset
        cuts: list[int] = []
        if self._baseline.model != "gpt":
            cuts = [1 + int(place) for place in np.flatnonzero(begins[:, 1:].any(axis=0))]
        total = 0.0
        for start, end in zip([0, *cuts], [*cuts, begins.shape[1]], strict=True):
            kept = torch.from_numpy(~begins[:, start]).float()[:, None]
            carry = jax.tree.map(lambda part, kept=kept: part * kept, carry)
            logits, carry = self._model(_ids(batch.tokens[:, start:end]), carry)
            targets = _ids(batch.targets[:, start:end])
            nats = F.cross_entropy(logits.mT, targets, reduction="none").numpy()
            total += float(nats[batch.loss_mask[:, start:end]].sum(dtype=np.float64))
        return total, carry


def _ids(tokens: np.ndarray) -> Any:
    return torch.from_numpy(tokens.astype(np.int64))
