"""Checkpoints of random weights under the names of `GLAForCausalLM`, and its logits.

``gla_recorded.npz`` has the logits of this model of flash-linear-attention 0.6.0 with each of
`VARIANTS`, in float32, whose kernels the interpreter of Triton 3.9 ran on a CPU.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

SETTINGS = {
    "model_type": "gla",
    "vocab_size": 37,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
}
VARIANTS = {
    "plain": {},
    "convolutions, tied": {"use_short_conv": True, "tie_word_embeddings": True},
    "clamped, unfused": {"clamp_min": -0.05, "fuse_norm": False, "norm_eps": 1e-4, "expand_v": 2.0},
}
"""Settings that differ from `SETTINGS` and from the defaults."""


def shapes_of(settings):
    """Shapes of all tensors by name."""
    hidden, mlp, vocab = (
        settings[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    keys, values = hidden // 2, int(hidden * settings.get("expand_v", 1))
    norm = "g_norm_swish_gate" if settings.get("fuse_norm", True) else "g_norm"
    layer = {
        "attn_norm": (hidden,),
        "attn.q_proj": (keys, hidden),
        "attn.k_proj": (keys, hidden),
        "attn.v_proj": (values, hidden),
        "attn.g_proj": (values, hidden),
        "attn.gk_proj.0": (16, hidden),
        "attn.gk_proj.1": (keys, 16),
        "attn.o_proj": (hidden, values),
        f"attn.{norm}": (values // settings["num_heads"],),
        "mlp_norm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    if settings.get("use_short_conv"):
        width = settings.get("conv_size", 4)
        sizes = {"q": keys, "k": keys, "v": values}
        layer |= {f"attn.{name}_conv1d": (size, 1, width) for name, size in sizes.items()}
    shapes = {"model.embeddings.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for index in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in layer.items()}
        shapes[f"{prefix}.attn.gk_proj.1.bias"] = (keys,)
    if not settings.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def draw_weights(settings):
    """Random weights by name, float32."""
    random = np.random.default_rng(0)
    return {
        name: (("norm" in name) + 0.3 * random.normal(size=shape)).astype(np.float32)
        for name, shape in sorted(shapes_of(settings).items())
    }


def draw_tokens(batch=2, length=19):
    return np.random.default_rng(1).integers(0, SETTINGS["vocab_size"], (batch, length), np.int32)


def save_checkpoint(folder, settings, weights, files=1):
    """Write a folder in Hugging Face's form, with the weights in `files` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if files == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return str(folder)
    names = [f"model-{index + 1:05}-of-{files:05}.safetensors" for index in range(files)]
    weight_map = {name: names[index % files] for index, name in enumerate(weights)}
    for file in names:
        held = {name: array for name, array in weights.items() if weight_map[name] == file}
        safetensors.numpy.save_file(held, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


def recorded_logits(variant):
    """Logits ``[B, T, vocab]`` of `draw_tokens`, by flash-linear-attention."""
    with np.load(Path(__file__).with_name("gla_recorded.npz")) as recorded:
        return recorded[variant]
