"""SimpleRNN language models in PyTorch, for `transformers.AutoModelForCausalLM`.

This file is part of every exported model and needs nothing but PyTorch and transformers. Parameters
of linear layers may have any floating dtype; gates, states, norms and softmax are float32.
"""

import dataclasses
import math

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import utils as generation_utils

PretrainedConfig = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
CACHE = "cache" if "cache" in generation_utils.ALL_CACHE_NAMES else "past_key_values"
"""Name of the cache in this version of transformers."""

CHUNK = 16
"""Tokens of a chunk of the recurrence."""
NORM_EPSILON = 1e-6
NEVER = -(2**40)
"""Position of a key that no query sees."""
ROTARY_BASE = 10_000.0


class SimpleRNNConfig(PretrainedConfig):
    """Sizes of a model; the fields as in `simplernn_jax.config.ModelConfig`."""

    model_type = "simplernn"
    attribute_map = {  # noqa: RUF012 - as transformers has it
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    }

    def __init__(
        self,
        vocab_size=259,
        block="parallel",
        num_layers=4,
        hidden_dim=128,
        key_dim=128,
        value_dim=128,
        num_heads=4,
        mlp_dim=512,
        tie_embeddings=True,
        mixers=None,
        attention_context=1024,
        use_cache=True,
        **others,
    ):
        self.vocab_size = vocab_size
        self.block = block
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.tie_embeddings = tie_embeddings and block != "plain"
        self.mixers = list(mixers or ["simple_rnn"] * num_layers)
        self.attention_context = attention_context
        self.use_cache = use_cache
        # The head reads the embedding itself: there is no second parameter to tie.
        super().__init__(**{**others, "tie_word_embeddings": False})


class SimpleRNNCache:
    """State of all layers: a constant number of bytes, except for layers of attention."""

    is_compileable = False

    def __init__(self, num_layers):
        self.layers = [{} for _ in range(num_layers)]
        """Tensors of each layer by name, axis B first."""
        self.seen_tokens = 0
        """Tokens so far, padding included."""
        self.is_linear = [False] * num_layers  # or transformers passes no lengths

    def get_seq_length(self, layer_idx=0):
        """Return the number of tokens so far."""
        return self.seen_tokens

    def reorder_cache(self, beam_idx):
        """Select sequences, as beam search does."""
        for layer in self.layers:
            for name, value in layer.items():
                layer[name] = value.index_select(0, beam_idx.to(value.device))


@dataclasses.dataclass
class SimpleRNNOutput(transformers.utils.ModelOutput):
    """Results of `SimpleRNNForCausalLM`; the cache has both of its names in transformers."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: SimpleRNNCache | None = None

    @property
    def past_key_values(self):
        """The cache, under its older name."""
        return self.cache


def rms_norm(x):
    """Normalize the last axis to a root mean square of 1."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON)


def log_sigmoid(x):
    """Compute log(sigmoid(x)), finite for any x; ONNX would compute log(0) of PyTorch's own."""
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))


def recurrence(q, k, v, log_gate, state):
    """``S_t = diag(e^log_gate_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t``, chunk by chunk.

    q, k and log_gate are [B, T, H, K], v is [B, T, H, V], the state [B, H, K, V]; all float32.
    Returns y [B, T, H, V] and the state after the last token. All exponents are at most 0.
    """
    if q.shape[1] == 1:
        state = state * log_gate[:, 0].exp()[..., None] + k[:, 0, :, :, None] * v[:, 0, :, None]
        return torch.einsum("bhk,bhkv->bhv", q[:, 0], state)[:, None], state
    outputs = []
    for start in range(0, q.shape[1], CHUNK):
        some_q, some_k, some_v, log_g = (x[:, start : start + CHUNK] for x in (q, k, v, log_gate))
        sums = log_g.cumsum(1)
        length = sums.shape[1]
        is_past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        decay = sums[:, :, None] - sums[:, None]
        decay = decay.masked_fill(~is_past[None, :, :, None, None], -math.inf).exp()
        scores = torch.einsum("bihk,bjhk,bijhk->bhij", some_q, some_k, decay)
        y = torch.einsum("bhij,bjhv->bihv", scores, some_v)
        outputs.append(y + torch.einsum("bihk,bhkv->bihv", some_q * sums.exp(), state))
        left = (sums[:, -1:] - sums).exp()
        state = state * sums[:, -1].exp()[..., None]
        state = state + torch.einsum("bjhk,bjhv->bhkv", some_k * left, some_v)
    return torch.cat(outputs, 1), state


def apply_rope(x, positions):
    """Rotate channel i of [B, T, H, K] with i + K/2, by exact angles at any position [B, T]."""
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    turns = (frequency / (2 * math.pi) * 2**32).round().long()
    angle = (positions[..., None] * turns) % 2**32
    angle = torch.where(angle >= 2**31, angle - 2**32, angle).float() * (2 * math.pi / 2**32)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Linear(nn.Linear):
    """Linear layer with operands in the dtype of its weights and float32 results."""

    def forward(self, x):
        """Apply the layer to [..., in]."""
        return super().forward(x.to(self.weight.dtype)).float()


class ShortConvolution(nn.Module):
    """Causal depthwise convolution; ``weight[:, n]`` multiplies the input n tokens earlier."""

    def __init__(self, features, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(1, width).repeat(features, 1))

    def forward(self, x, layer):
        """Apply it to [B, T, D], after the inputs that the state of the layer holds."""
        past = self.weight.shape[1] - 1
        before = layer.get("recent")
        if before is None:
            before = x.new_zeros(x.shape[0], past, x.shape[2])
        x = torch.cat([before, x], 1)
        layer["recent"] = x[:, -past:]
        length = x.shape[1] - past
        parts = [
            x[:, past - n : past - n + length] * self.weight[:, n].float() for n in range(past + 1)
        ]
        return sum(parts[1:], parts[0])


class SimpleRNNLayer(nn.Module):
    """One layer: with ``block="plain"`` the bare cell, otherwise a pre-norm block with an MLP."""

    def __init__(self, config, mixer):
        super().__init__()
        self.config, self.mixer, self.is_plain = config, mixer, config.block == "plain"
        hidden, plain = config.hidden_dim, self.is_plain
        recurrent = mixer == "simple_rnn"
        self.query_proj = Linear(hidden, config.key_dim, bias=plain)
        self.key_proj = Linear(hidden, config.key_dim, bias=recurrent)
        self.value_proj = Linear(hidden, config.value_dim, bias=plain)
        self.out_proj = Linear(config.value_dim, hidden, bias=plain)
        if recurrent:
            self.gate_proj = Linear(hidden, config.key_dim, bias=True)
        if not plain:
            self.convolution = ShortConvolution(hidden)
            self.output_gate_proj = Linear(hidden, config.value_dim, bias=False)
            self.mlp_in = Linear(hidden, config.mlp_dim, bias=False)
            self.mlp_out = Linear(config.mlp_dim, hidden, bias=False)

    def forward(self, x, is_token, layer):
        """Apply the layer to [B, T, D]; `is_token` [B, T] is False for padding.

        `layer` holds the state before, and after the call that after the last token.
        """
        if self.is_plain:
            return self.out_proj(self.mix(x, is_token, layer).flatten(2))
        y = self.convolution(rms_norm(x) * is_token[..., None], layer)
        heads = rms_norm(self.mix(y, is_token, layer)).flatten(2)
        x = x + self.out_proj(heads * functional.silu(self.output_gate_proj(y)))
        y = y if self.config.block == "parallel" else rms_norm(x)
        return x + self.mlp_out(self.mlp_in(y).relu().square())

    def mix(self, x, is_token, layer):
        """Mix the tokens: [B, T, D] to [B, T, H, V]."""
        heads = (*x.shape[:2], self.config.num_heads, -1)
        q, k, v = (f(x).reshape(heads) for f in (self.query_proj, self.key_proj, self.value_proj))
        if self.mixer == "attention":
            return self.attend(q, k, v, is_token, layer)
        # Padding neither decays the state nor adds to it.
        k = k.sigmoid() * is_token[..., None, None]
        log_gate = log_sigmoid(self.gate_proj(x)).reshape(heads)
        log_gate = log_gate * is_token[..., None, None]
        if not self.is_plain:
            q = q * q.shape[-1] ** -0.5
        state = layer.get("state")
        if state is None:
            state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        y, layer["state"] = recurrence(q, k, v, log_gate, state)
        return y

    def attend(self, q, k, v, is_token, layer):
        """Attend to the last `attention_context` tokens, with rotary position embedding."""
        context = self.config.attention_context
        length = layer.get("length")
        if length is None:
            length = torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
        positions = length[:, None] + is_token.long().cumsum(1) - 1
        q, k = apply_rope(q, positions), apply_rope(k, positions)
        key_positions = positions.masked_fill(~is_token, NEVER)
        if "keys" in layer:
            k, v = torch.cat([layer["keys"], k], 1), torch.cat([layer["values"], v], 1)
            key_positions = torch.cat([layer["positions"], key_positions], 1)
        distance = positions[:, :, None] - key_positions[:, None]
        is_visible = (distance >= 0) & (distance < context)
        # A token of padding may see nothing; its result is not used, but must not be NaN.
        scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~is_visible[:, None], torch.finfo(scores.dtype).min)
        y = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)
        layer["keys"], layer["values"] = k[:, -context:], v[:, -context:]
        layer["positions"] = key_positions[:, -context:]
        layer["length"] = length + is_token.sum(1)
        return y


class SimpleRNNForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, layers and head; batches may be padded on the left."""

    config_class = SimpleRNNConfig
    base_model_prefix = ""
    _input_embed_layer = "embedding"
    _is_stateful = True
    _no_split_modules = ("SimpleRNNLayer",)

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.layers = nn.ModuleList(SimpleRNNLayer(config, mixer) for mixer in config.mixers)
        if config.block != "plain":
            self.final_norm = nn.Module()
            self.final_norm.weight = nn.Parameter(torch.ones(config.hidden_dim))
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_dim, config.vocab_size)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        use_cache=True,
        logits_to_keep=0,
        next_sequence_length=None,
        **_,
    ):
        """Keep the tokens that the cache has not seen: one, or a new part of a conversation."""
        cache = cache if cache is not None else past_key_values
        unseen = next_sequence_length  # None in transformers 4, and where all ids are new
        if unseen is None and cache is not None and attention_mask is not None:
            unseen = attention_mask.shape[1] - cache.seen_tokens
        if unseen is not None:
            if unseen <= 0:
                raise ValueError(
                    "the cache has seen all tokens; pass the ids of the whole sequence"
                )
            input_ids = input_ids[:, -unseen:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "cache": cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **options):
        if outputs.cache is not None:
            model_kwargs[CACHE] = outputs.cache
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **options)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        cache=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=True,
        num_items_in_batch=None,
        **_,
    ):
        """Compute logits [B, T, vocab], float32, and with `labels` the mean loss.

        `attention_mask` is [B, T], or [B, past + T] with a cache; 0 is padding, which only the
        first call with a cache may have. The cache is changed in place and returned. With
        `num_items_in_batch`, the number of targets of a batch that is split into several calls, the
        loss is the sum divided by it.
        """
        x = self.embedding(input_ids).float()
        if self.config.block != "plain":
            x = x * self.config.hidden_dim**0.5
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = cache if cache is not None else past_key_values
        states = cache if cache is not None else SimpleRNNCache(len(self.layers))
        if attention_mask is None:
            is_token = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            is_token = attention_mask[:, -x.shape[1] :].bool()
            if states.seen_tokens and not is_token.all():
                raise ValueError("padding after the first call; pad its sequences on the left")
        for layer, state in zip(self.layers, states.layers, strict=True):
            x = layer(x, is_token, state)
        states.seen_tokens += x.shape[1]
        if self.config.block != "plain":
            x = rms_norm(x) * self.final_norm.weight.float()
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        if self.config.tie_embeddings:
            weight = self.embedding.weight
            logits = functional.linear(x.to(weight.dtype), weight).float()
        else:  # a resized head is a plain nn.Linear
            logits = self.lm_head(x.to(self.lm_head.weight.dtype)).float()
        loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1)
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets, reduction=reduction
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        output = SimpleRNNOutput(loss, logits, states if use_cache else None)
        return output if return_dict else output.to_tuple()
