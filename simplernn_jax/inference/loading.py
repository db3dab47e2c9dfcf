"""Loading of a trained model from the workdir of its run, or from its export."""

from absl import logging
from flax import nnx

from simplernn_jax.checkpoint.choice import BEST, choose_checkpoint
from simplernn_jax.checkpoint.contents import read_texts, read_tree
from simplernn_jax.config import Config
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.data.tokenizer_loading import tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.inference.exported_folder import is_exported, load_exported
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.initialization import abstract_model


def load_model(
    workdir: str, checkpoint: str | int = BEST
) -> tuple[LanguageModel, Tokenizer, Config]:
    """Load the trained model of a run, its tokenizer and its configuration.

    The checkpoint is verified and restored; nothing in it is executed.

    Args:
      workdir: folder of a training run, or of its export as safetensors or for Hugging Face.
      checkpoint: of a training run: ``best``, the one of lowest validation loss, or the newest if
        the losses were measured on different tokens; ``newest``; or a step.

    Returns:
      The model, with float32 parameters on the default device; its tokenizer; the configuration of
      the run.

    Raises:
      UserError: `workdir` has no such checkpoint, or no valid one, or its export is corrupted, or
        the tokenizer has ids that the model does not have.
    """
    loaded = load_exported(workdir) if is_exported(workdir) else _load_run(workdir, checkpoint)
    model, tokenizer, _ = loaded
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{workdir}: the tokenizer has {tokenizer.vocab_size:,} ids and the model "
            f"{model.config.vocab_size:,}; use the tokenizer that the model was trained with"
        )
    return loaded


def _load_run(workdir: str, checkpoint: str | int) -> tuple[LanguageModel, Tokenizer, Config]:
    _, path, reason = choose_checkpoint(workdir, checkpoint)
    if reason is not None:
        logging.info("%s", reason)
    config, tokenizer_json = read_texts(path)
    graph, params = abstract_model(config.model)
    params = read_tree(path, {"params": params}, partial=True)["params"]
    return nnx.merge(graph, params), tokenizer_from_json(tokenizer_json), config
