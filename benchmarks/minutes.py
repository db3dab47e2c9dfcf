"""Held-out loss of the sizes of ``train.py --size=auto`` after some minutes, by their parameters.

The speed of each is measured first, and kept in ``--out``: later trainings, whose steps follow from
it, end with the same loss however busy the machine is then.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from simplernn_jax.config import Config, validate
from simplernn_jax.errors import UserError
from simplernn_jax.training.calibration import Costs, measure, plan
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.loop import train
from simplernn_jax.training.run import Run
from simplernn_jax.training.sizing import SIZES, auto_size, measure_flops
from simplernn_jax.training.train_step import make_train_step

from .measure import call_isolated
from .tables import Row, Table
from .train_steps import count_parameters

TITLE = "minutes: held-out bits/byte by size"


def run(minutes: Sequence[str], source: str | None, kept: Mapping[str, Table]) -> Iterator[Table]:
    """Train each of `SIZES` on `source` for each of `minutes`, unless it is in the results.

    Without minutes, only speeds are measured. Sizes that are too slow for the minutes are left out.

    Raises:
      UserError: `minutes` are not numbers, or as for `train`.
    """
    try:
        limits = [float(limit) for limit in minutes]
    except ValueError as error:
        raise UserError(f"--minutes: {error}; list numbers, such as --minutes=1,5") from error
    source = os.path.expanduser(source or "stdlib")
    data: Row = dict(kept[TITLE].data) if TITLE in kept else {"speeds": {}, "runs": {}}
    flops = data.setdefault("flops", measure_flops())
    for limit in limits or [5.0]:
        config = Config()
        config.mesh.data, config.train.size, config.train.minutes = 1, "auto", limit
        config.data.source = os.path.abspath(source) if os.path.exists(source) else source
        validate(config)
        chosen = auto_size(config, "", flops).model
        for size in SIZES:
            sized = auto_size(config, "", flops, size)
            shape = f"{source} {size.num_layers}x{size.width} {sized.data.sequence_length}"
            case = f"{limit:g} {shape}"
            with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
                given: Row = {"config": sized, "workdir": folder}
                if shape not in data["speeds"]:
                    data["speeds"][shape] = call_isolated(measure_speed, **given)
                    yield table(data)
                if not limits or case in data["runs"]:
                    continue
                try:
                    row = call_isolated(train_planned, **given, speed=data["speeds"][shape])
                except UserError as error:
                    print(f"  {case}: {error}", flush=True)
                    continue
                chosen_too = {"auto": "chosen" if sized.model == chosen else ""}
                text = {"text": os.path.basename(source), "minutes": limit}
                data["runs"][case] = text | row | chosen_too
                yield table(data)


def measure_speed(config: Config, workdir: str) -> Row:
    """The costs of a run, the seconds before its first step, and its held-out predictions."""
    started = time.monotonic()
    with Run(config, workdir) as run:
        step = make_train_step(run.config, run.optimizer, run.mesh)
        costs = measure(run, step, Evaluator(run.config, run.corpus.tokenizer.pad_id, run.mesh))
        assert run.corpus.validation is not None
        held_out = run.corpus.validation.num_predictions
        return {"costs": [*costs], "start": time.monotonic() - started, "held_out": held_out}


def train_planned(config: Config, workdir: str, speed: Row) -> Row:
    """Train for the steps that follow from `measure_speed`, and score all held-out text."""
    left = 60 * config.train.minutes - speed["start"]
    plan(config, Costs(*speed["costs"]), left, speed["held_out"])
    steps, config.train.eval_tokens = config.train.steps, 0
    config.train.eval_every = config.train.save_every = config.train.sample_every = 0
    result = train(config, workdir).evaluation
    assert result is not None
    return {
        **{"layers": config.model.num_layers, "width": config.model.hidden_dim},
        **{"tokenizer": config.data.tokenizer, "dropout": config.model.dropout, "steps": steps},
        **{"parameters": count_parameters(config), "bits/byte": result.bits_per_byte},
    }


def table(data: Row) -> Table:
    """All results so far, with a panel for each text; of speeds alone, those."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    rows = sorted(data["runs"].values(), key=lambda row: (row["minutes"], row["parameters"]))
    for row in rows:
        curve = panels.setdefault(row["text"], {}).setdefault(f"{row['minutes']:g} minutes", {})
        curve[str(row["parameters"] // 1000)] = row["bits/byte"]
    speeds = data["speeds"].items()
    rows = rows or [{"run": name, "ms per step": 1e3 * speed["costs"][0]} for name, speed in speeds]
    return Table(TITLE, rows, panels, "thousands of parameters", "minutes", data=data)
