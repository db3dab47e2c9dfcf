"""Samples of text that a run takes on its way."""

from flax import nnx

from simplernn_jax.config import Config
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.inference import generate_text
from simplernn_jax.sharding.layer_layout import in_layout_of
from simplernn_jax.training.gradient import abstract_model

TEMPERATURE = 0.8


def sample_text(config: Config, params: nnx.State, tokenizer: Tokenizer) -> str:
    """Return the prompt of the configuration and what a model with `params` makes of it."""
    train = config.train
    graph, abstract = abstract_model(config)
    (text,) = generate_text(
        nnx.merge(graph, in_layout_of(abstract, params)),
        tokenizer,
        train.sample_prompt,
        max_new_tokens=train.sample_tokens,
        temperature=TEMPERATURE,
        seed=train.seed,
    )
    return train.sample_prompt + text
