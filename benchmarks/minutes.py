"""Held-out loss after some minutes of training, by size, around the size of ``--size=auto``."""

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from flax import nnx

from simplernn_jax import load_model
from simplernn_jax.config import Config
from simplernn_jax.errors import UserError
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.loop import train
from simplernn_jax.training.minutes import SIZES, auto_size
from simplernn_jax.training.preparation import open_saved_corpus

from .measure import call_isolated
from .tables import Row, Table
from .train_steps import count_parameters

TITLE = "minutes: held-out bits/byte by size"


def run(minutes: Sequence[float], source: str | None, kept: Mapping[str, Table]) -> Iterator[Table]:
    """Train on `source` for each of `minutes`, with the size that is chosen and its neighbors.

    Sizes that already have a result, or are too slow for the time, are skipped.
    """
    path = os.path.normpath(os.path.expanduser(source or "stdlib"))
    rows = list(kept[TITLE].rows) if TITLE in kept else []
    config = Config()
    config.mesh.data = 1
    config.data.source = os.path.abspath(path) if os.path.exists(path) else path
    for limit in minutes:
        if not limit:
            raise UserError("--minutes=0: must be above 0")
        config.train.minutes = limit
        auto_size(chosen := copy.deepcopy(config), "")
        index = [size.width for size in SIZES].index(chosen.model.hidden_dim)
        for size in SIZES[max(0, index - 1) : index + 2]:
            case: Row = {"text": os.path.basename(path), "minutes": limit}
            case |= {"layers": size.num_layers, "width": size.width}
            if any(case.items() <= row.items() for row in rows):
                continue
            auto_size(sized := copy.deepcopy(config), "", size)
            try:
                with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
                    rows.append(case | call_isolated(held_out_loss, config=sized, workdir=folder))
                yield table(rows)
            except UserError as error:
                print(f"  {case}: {error}", flush=True)


def held_out_loss(config: Config, workdir: str) -> Row:
    """Train for the minutes of `config`; size and held-out bits per byte."""
    result = train(config, workdir)
    model, tokenizer, config = load_model(workdir)
    held_out = open_saved_corpus(workdir).validation
    assert held_out is not None
    # All of it: what a run scores within its minutes depends on the speed of the model.
    evaluator = Evaluator(config, tokenizer.pad_id)
    evaluation = evaluator(nnx.state(model, nnx.Param), held_out)
    return {
        **{"tokenizer": config.data.tokenizer, "dropout": config.model.dropout},
        **{"steps": result.step, "parameters": count_parameters(config)},
        "bits/byte": evaluation.bits_per_byte,
    }


def table(rows: Sequence[Row]) -> Table:
    """All results so far, with a panel for each text."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    rows = sorted(rows, key=lambda row: (row["text"], row["minutes"], row["parameters"]))
    for row in rows:
        curve = panels.setdefault(row["text"], {}).setdefault(f"{row['minutes']:g} min", {})
        curve[str(row["parameters"] // 1000)] = row["bits/byte"]
    return Table(TITLE, rows, panels, "thousands of parameters", "minutes")
