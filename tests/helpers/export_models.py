"""Small models of every kind, shared by the tests of exports."""

from flax import nnx
from small_tokenizers import bpe_of, char_tokenizer, pretrained

from benchmarks.stress.fuzz import TEXT, byte_level_json
from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.data import load_tokenizer
from simplernn_jax.export.formats import TrainedModel
from simplernn_jax.models import LanguageModel

MODELS = {
    "plain": {
        **{"block": "plain", "num_layers": 2, "num_heads": 1, "hidden_dim": 8},
        **{"key_dim": 5, "value_dim": 7},
    },
    "residual": {"num_layers": 1, "tie_embeddings": False},
    "hybrid": {"mixer": "simple_rnn,attention", "num_layers": 2, "mixer_options": {"context": 13}},
}
"""Fields of the model by the name of a case."""

GLA = {
    **{"block": "swiglu", "mixer": "gla", "mixer_options": {"short_convolution": 3}},
    **{"num_layers": 2, "norm_epsilon": 1e-4},
}
TOKENIZERS = {
    "byte": lambda: load_tokenizer("byte", None),
    "char": lambda: char_tokenizer("".join(sorted(set(TEXT + "abc<|eos>")))),
    "bpe": lambda: pretrained(byte_level_json("<s>", "</s>")),
    "trained": lambda: bpe_of(TEXT),
}


SIZES = {"hidden_dim": 8, "key_dim": 12, "value_dim": 18, "num_heads": 3, "mlp_dim": 11}


def trained(fields, tokenizer=None, workdir="runs/small", **data):
    """A model with random parameters, as it is exported."""
    tokenizer = tokenizer or load_tokenizer("byte", None)
    model = ModelConfig(**{**SIZES, "num_layers": 1, **fields})
    model.vocab_size = tokenizer.vocab_size
    config = Config(model=model)
    config.train.steps = 1
    for name, value in data.items():
        setattr(config.data, name, value)
    result = LanguageModel(model, rngs=nnx.Rngs(0))
    for layer in result.layers:
        if hasattr(layer.mixer, "cell"):
            bias = layer.mixer.cell.gate_proj.bias
            bias[...] = bias[...].at[0].set(-200.0)  # a gate of 0, whose logarithm is finite
    return TrainedModel(result, tokenizer, config, workdir)
