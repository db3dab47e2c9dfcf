"""Contents of the folder of one checkpoint, read without the run that wrote it.

Items: ``state`` (arrays named by their path), ``data`` (position), ``config``, ``tokenizer`` and
``quality`` (JSON). Nothing in them is executed. Callers verify the folder's manifest first.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file
from simplernn_jax.parallel.named_leaves import named_leaves

TEXTS = ("config", "tokenizer")
"""Items that `read_texts` reads."""

QUALITY_ITEM = "quality"
"""Item that `read_quality` reads."""

_MAX_JSON_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Quality:
    """Evaluation by which checkpoints are ranked."""

    validation_loss: float
    """Nats per token; lower is better."""
    predictions: int
    """Number of predictions scored: equal numbers mean equal tokens."""


def read_json(path: str, item: str) -> Any:
    """Read a JSON item of a checkpoint folder; `UserError` if it cannot be read or parsed."""
    file = os.path.join(path, item, "metadata")
    try:
        return json.loads(read_file(file, _MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file}: {reason}; use another checkpoint") from error


def read_texts(path: str) -> tuple[Config, str]:
    """Read the configuration and the tokenizer's JSON text."""
    config = config_lib.from_json(json.dumps(read_json(path, "config")))
    return config, read_json(path, "tokenizer")


def quality_item(step: int, quality: Quality | None) -> dict[str, Any]:
    """Return the item that `read_quality` reads; NaN, as a loss, is none."""
    if quality is None or not math.isfinite(quality.validation_loss):
        return {"step": step, "validation_loss": None, "predictions": None}
    return {"step": step, **dataclasses.asdict(quality)}


def read_quality(path: str) -> tuple[int, Quality | None]:
    """Read the step of a checkpoint, -1 if the record is corrupt, and the evaluation if any."""
    try:
        saved = read_json(path, QUALITY_ITEM)
        loss, predictions = saved["validation_loss"], saved["predictions"]
        quality = None if loss is None else Quality(float(loss), int(predictions))
        return int(saved["step"]), quality
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return -1, None


def saved_leaves(path: str) -> dict[str, Any]:
    """Return ``shape`` and ``dtype`` of every array in the checkpoint folder `path`, by name."""
    handler = ocp.PyTreeCheckpointHandler()
    return dict(handler.metadata(epath.Path(path) / "state").tree)


def read_arrays(
    path: str, names: Sequence[str], shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read the named arrays of the checkpoint folder `path`, bit-exactly; 0 for a missing one.

    Those that have a sharding in `shardings` are JAX arrays with that sharding, the others numpy's.
    """

    def restore_args(name: str) -> ocp.RestoreArgs:
        sharding = shardings.get(name) if shardings else None
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding)

    args = ocp.args.PyTreeRestore(
        dict.fromkeys(names, 0),
        restore_args={name: restore_args(name) for name in names},
        partial_restore=True,
    )
    arrays: dict[str, Any] = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path) / "state", args=args
    )
    return arrays


def read_tree(path: str, abstract: Any, shardings: Any = None, *, partial: bool = False) -> Any:
    """Read a tree of arrays of the checkpoint folder `path`, bit-exactly.

    Args:
      path: folder of a checkpoint.
      abstract: tree of arrays or `jax.ShapeDtypeStruct`.
      shardings: sharding of each array; None is the default device.
      partial: whether the checkpoint may hold other arrays too.

    Raises:
      UserError: an array is missing or of another shape or dtype.
    """
    wanted, saved = named_leaves(abstract), saved_leaves(path)
    if partial:
        saved = {name: leaf for name, leaf in saved.items() if name in wanted}
    _check_leaves(path, wanted, saved)
    by_name = None if shardings is None else named_leaves(shardings)
    arrays = read_arrays(path, list(wanted), by_name)
    # A copy that JAX owns: an alias of numpy's memory could not be donated.
    leaves = [jnp.array(arrays[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _check_leaves(path: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first leaf of two sets that differs in name, shape or dtype."""

    def describe(leaves: Mapping[str, Any], name: str) -> str:
        leaf = leaves.get(name)
        return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

    for name in [*wanted, *saved]:
        current, stored = describe(wanted, name), describe(saved, name)
        if current != stored:
            raise UserError(
                f"{path}: does not match this configuration: {name} is {current}, checkpoint has "
                f"{stored}; use the configuration it was saved with, or another --workdir"
            )
