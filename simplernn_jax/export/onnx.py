"""ONNX graphs ``prefill.onnx`` and ``decode.onnx``, converted from the format huggingface.

Both map ``tokens`` [1, T] int64 and the state to ``logits`` [1, T, vocab] float32 and the next
state, with T of 64 in prefill and 1 in decode. Names, shapes and zero values of the state are in
``config.json``; opset 18. JAX itself has no converter to ONNX, and `torch.onnx` knows every
operation of the PyTorch model.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.export.example import PREFILL_TOKENS, ExportedModel
from simplernn_jax.export.formats import (
    TrainedModel,
    check_architecture,
    check_packages,
    description,
    rounded_weights,
    stored_weight,
    write_example,
)
from simplernn_jax.models.pytorch_weights import named_weights

OPSET = 18
MAX_INLINE_BYTES = 1 << 30
"""Weights beyond this are separate files: a graph has at most 2 GiB."""
README = {
    "kind": "in ONNX",
    "packages": "onnxruntime tokenizers",
    "programs": "| `prefill.onnx`, `decode.onnx` | graphs with the weights; large weights are in "
    "files `.data` next to them |",
    "arguments": "Inputs of both graphs are `tokens` `[1, T]` int64 and the parts of the state; "
    "outputs are\n`logits` `[1, T, vocab]` and `next.NAME` for each part.",
}


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the files."""
    check_architecture("onnx", trained.model)
    check_packages("onnx", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    import torch

    from simplernn_jax.export.huggingface import modeling_simplernn

    kind = trained.quantize
    config = modeling_simplernn.SimpleRNNConfig(**description(trained))
    model = modeling_simplernn.SimpleRNNForCausalLM(config)
    weights = rounded_weights(named_weights(trained.model), kind)
    model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    state = initial_state(modeling_simplernn, model)

    class Step(torch.nn.Module):
        """The model with its state as arguments and results."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Any, *arrays: Any) -> tuple[Any, ...]:
            cache = modeling_simplernn.SimpleRNNCache(len(model.layers))
            for name, array in zip(state, arrays, strict=True):
                layer, part = name.split(".")
                cache.layers[int(layer)][part] = array
            output = self.model(tokens, cache=cache, use_cache=True)
            new = (output.cache.layers[int(n.split(".")[0])][n.split(".")[1]] for n in state)
            return (output.logits, *new)

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # about packages that are not needed
    is_large = sum(x.nbytes for x in weights.values()) > MAX_INLINE_BYTES
    for name, length in (("prefill", PREFILL_TOKENS), ("decode", 1)):
        tokens = torch.zeros(1, length, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own modules
            torch.onnx.export(
                Step().eval(),
                (tokens, *state.values()),
                str(folder / f"{name}.onnx"),
                input_names=["tokens", *state],
                output_names=["logits", *(f"next.{name}" for name in state)],
                opset_version=OPSET,
                dynamo=True,
                external_data=is_large,
                verbose=False,
            )
        _finish(folder / f"{name}.onnx", kind, is_large=is_large)
    arrays = {name: x.numpy() for name, x in state.items()}
    write_example(trained, folder, README, 1, arrays, opset=OPSET)


def _finish(path: Path, kind: str, *, is_large: bool) -> None:
    """Remove the positions in source code that the converter adds, and store rounded weights."""
    import onnx

    model = onnx.load(path)
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
    if kind == "float16":
        _store_float16(model.graph)
    onnx.save(model, path, save_as_external_data=is_large, location=data.name)
    onnx.checker.check_model(str(path))  # the path tells where separate files of weights are


def _store_float16(graph: Any) -> None:
    """Replace matrices by float16 values, and nodes that convert them."""
    import onnx

    for tensor in list(graph.initializer):
        (values,) = stored_weight(onnx.numpy_helper.to_array(tensor), "float16")
        if tensor.data_type == onnx.TensorProto.FLOAT and values.dtype == np.float16:
            stored = onnx.numpy_helper.from_array(values, f"{tensor.name}.stored")
            to_float32 = onnx.helper.make_node(
                "Cast", [stored.name], [tensor.name], to=onnx.TensorProto.FLOAT
            )
            graph.initializer.remove(tensor)
            graph.initializer.append(stored)
            graph.node.insert(0, to_float32)


def initial_state(modeling: Any, model: Any) -> dict[str, Any]:
    """Make the state before the first token of one sequence; its caches have a fixed size.

    Keys of attention begin at a position that no query sees.
    """
    import torch

    config, state = model.config, {}
    heads = config.num_heads
    key_dim, value_dim = config.key_dim // heads, config.value_dim // heads
    for number, layer in enumerate(model.layers):
        if layer.mixer == "attention":
            slots = config.attention_context
            state[f"{number}.keys"] = torch.zeros(1, slots, heads, key_dim)
            state[f"{number}.values"] = torch.zeros(1, slots, heads, value_dim)
            state[f"{number}.positions"] = torch.full((1, slots), modeling.NEVER)
            state[f"{number}.length"] = torch.zeros(1, dtype=torch.long)
        else:
            state[f"{number}.state"] = torch.zeros(1, heads, key_dim, value_dim)
        if not layer.is_plain:
            past = layer.convolution.weight.shape[1] - 1
            state[f"{number}.recent"] = torch.zeros(1, past, config.hidden_dim)
    return state


load = ExportedModel
