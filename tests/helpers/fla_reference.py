"""Checkpoints of random weights under the names of flash-linear-attention, and their logits.

``fla_recorded.npz`` has the logits of the models of flash-linear-attention 0.6.0 with each of
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
    "retnet": {"model_type": "retnet", "use_short_conv": True, "expand_v": 1.0},  # it has none
    "hgrn2": {"model_type": "hgrn2", "expand_ratio": 32, "num_hidden_layers": 3},
    "hgrn2, convolutions": {
        **{"model_type": "hgrn2", "expand_ratio": None, "use_short_conv": True},
        "use_lower_bound": False,
    },
    "mamba2": {
        **{"model_type": "mamba2", "head_dim": 32, "num_heads": 4, "state_size": 16},
        "tie_word_embeddings": False,
    },
    "gated_deltanet": {"model_type": "gated_deltanet", "head_dim": 32, "expand_v": 1.0},
    "gated_deltanet, negative": {
        **{"model_type": "gated_deltanet", "head_dim": 16, "expand_v": 2.0},
        **{"allow_neg_eigval": True, "use_short_conv": False},
    },
}
"""Settings that differ from `SETTINGS` and from the defaults."""


def layer_shapes(settings):
    """Shapes of the tensors of a layer by name."""
    value = settings.get
    kind, hidden, heads = settings["model_type"], settings["hidden_size"], settings["num_heads"]
    if kind == "mamba2":
        values, state, width = 2 * hidden, settings["state_size"], value("conv_kernel", 4)
        channels = values + 2 * state
        return {
            "norm.weight": (hidden,),
            "mixer.in_proj.weight": (values + channels + heads, hidden),
            "mixer.conv1d.weight": (channels, 1, width),
            "mixer.conv1d.bias": (channels,),
            **{f"mixer.{name}": (heads,) for name in ("A_log", "D", "dt_bias")},
            "mixer.norm.weight": (values,),
            "mixer.out_proj.weight": (hidden, values),
        }
    mlp = settings["intermediate_size"]
    keys, values = (
        int(hidden * value(name, default))
        for name, default in (("expand_k", 1 if kind == "retnet" else 0.5), ("expand_v", 1))
    )
    norm = "g_norm_swish_gate" if value("fuse_norm", True) else "g_norm"
    names, gate = ("q", "k", "v"), {"attn.g_proj": (values, hidden)}
    others = {f"attn.{norm}": (values // heads,)}
    if kind == "gla":
        others |= {"attn.gk_proj.0": (16, hidden), "attn.gk_proj.1": (keys, 16)}
    elif kind == "hgrn2":
        keys, names, gate, others = hidden, ("q", "f", "i"), {}, {"attn.g_norm": (hidden,)}
    elif kind == "gated_deltanet":
        keys = heads * settings["head_dim"]
        values = int(keys * settings["expand_v"])
        gate = {"attn.g_proj": (values, hidden)}
        others = dict.fromkeys(("attn.a_proj", "attn.b_proj"), (heads, hidden))
        others["attn.o_norm"] = (values // heads,)
    sizes = dict(zip(names, (keys, keys, values), strict=True))
    layer = {f"attn.{name}_proj": (size, hidden) for name, size in sizes.items()}
    layer |= {
        **gate,
        **others,
        "attn_norm": (hidden,),
        "attn.o_proj": (hidden, values),
        "mlp_norm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    if value("use_short_conv", kind == "gated_deltanet") and kind != "retnet":
        width = value("conv_size", 4)
        layer |= {f"attn.{name}_conv1d": (size, 1, width) for name, size in sizes.items()}
    shapes = {f"{name}.weight": shape for name, shape in layer.items()}
    if kind == "gla":
        shapes["attn.gk_proj.1.bias"] = (keys,)
    elif kind == "gated_deltanet":
        shapes |= {"attn.A_log": (heads,), "attn.dt_bias": (heads,)}
    return shapes


def shapes_of(settings):
    """Shapes of all tensors by name."""
    hidden, vocab, layers = (
        settings[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers")
    )
    is_mamba = settings["model_type"] == "mamba2"
    prefix, norm = ("backbone", "norm_f") if is_mamba else ("model", "norm")
    shapes = {f"{prefix}.embeddings.weight": (vocab, hidden), f"{prefix}.{norm}.weight": (hidden,)}
    for index in range(layers):
        shapes |= {f"{prefix}.layers.{index}.{n}": s for n, s in layer_shapes(settings).items()}
    if settings["model_type"] == "hgrn2" and settings.get("use_lower_bound", True):
        shapes["model.lower_bounds"] = (layers, hidden)
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
    with np.load(Path(__file__).with_name("fla_recorded.npz")) as recorded:
        return recorded[variant]
