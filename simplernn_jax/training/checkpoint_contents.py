"""What lies in the folder of one checkpoint, and how to read it without the run that wrote it.

Items: ``state`` (arrays named by their path), ``data`` (position), ``config``, ``tokenizer`` and
``quality`` (JSON). Nothing in them is executed. Callers verify the folder's manifest first.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.errors import UserError

QUALITY = "validation_loss"
"""The metric that ranks checkpoints; lower is better."""


def saved_leaves(path: str) -> dict[str, Any]:
    """Name, ``shape`` and ``dtype`` of every array in the checkpoint folder `path`."""
    handler = ocp.PyTreeCheckpointHandler()
    return dict(handler.metadata(epath.Path(path) / "state").tree)


def read_arrays(
    path: str, names: Sequence[str], shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The named arrays of the checkpoint folder `path`, byte for byte as they were saved.

    Those that `shardings` gives a sharding are JAX's and lie so; the others are numpy's.
    """

    def how(name: str) -> ocp.RestoreArgs:
        sharding = shardings.get(name) if shardings else None
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding)

    args = ocp.args.PyTreeRestore(
        dict.fromkeys(names, 0),
        restore_args={name: how(name) for name in names},
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler().restore(epath.Path(path) / "state", args=args)


def check_leaves(path: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compares names, shapes and dtypes of two sets of leaves.

    Raises:
      UserError: names the first leaf that differs.
    """

    def describe(leaves: Mapping[str, Any], name: str) -> str:
        leaf = leaves.get(name)
        return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

    for name in [*wanted, *saved]:
        here, there = describe(wanted, name), describe(saved, name)
        if here != there:
            raise UserError(
                f"the checkpoint {path} does not fit this configuration: {name} is {here} here "
                f"and {there} there; use the configuration it was saved with, or another --workdir"
            )


def read_json(path: str, item: str) -> Any:
    """What was saved as the JSON item `item` of the checkpoint folder `path`."""
    return ocp.JsonCheckpointHandler().restore(epath.Path(path) / item)


TEXTS = ("config", "tokenizer")
"""The items of `read_texts`."""


def read_texts(path: str) -> tuple[Config, str]:
    """The configuration and the tokenizer's JSON text."""
    config = config_lib.from_json(json.dumps(read_json(path, "config")))
    return config, read_json(path, "tokenizer")


def saved_quality(path: str) -> float | None:
    """The validation loss saved with a checkpoint; None if there is none or it is damaged."""
    try:
        quality = read_json(path, "quality")[QUALITY]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return quality if isinstance(quality, float) else None
