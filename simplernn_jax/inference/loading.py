"""Loading of a trained model from the workdir of its run."""

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from simplernn_jax.checkpoint.choice import BEST, choose_checkpoint
from simplernn_jax.checkpoint.contents import check_leaves, read_arrays, read_texts, saved_leaves
from simplernn_jax.config import Config
from simplernn_jax.data.tokenizer import Tokenizer, tokenizer_from_json
from simplernn_jax.models import LanguageModel
from simplernn_jax.named_leaves import named_leaves


def load_model(
    workdir: str, checkpoint: str | int = BEST
) -> tuple[LanguageModel, Tokenizer, Config]:
    """Load the trained model of a run, its tokenizer and its configuration.

    The checkpoint is verified and restored; nothing in it is executed.

    Args:
      workdir: folder of a training run.
      checkpoint: ``best``, the one of lowest validation loss, or the newest if the losses were
        measured on different tokens; ``newest``; or a step.

    Raises:
      UserError: `workdir` has no such checkpoint, or no valid one.
    """
    _, path, reason = choose_checkpoint(workdir, checkpoint)
    if reason is not None:
        logging.info("%s", reason)
    config, tokenizer_json = read_texts(path)
    abstract = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(abstract, nnx.Param)
    wanted = named_leaves({"params": params})
    saved = {name: leaf for name, leaf in saved_leaves(path).items() if name in wanted}
    check_leaves(path, wanted, saved)
    arrays = read_arrays(path, list(wanted))
    leaves = [jnp.array(arrays[name]) for name in wanted]
    model = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(params), leaves))
    return model, tokenizer_from_json(tokenizer_json), config
