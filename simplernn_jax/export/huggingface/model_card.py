"""Model card of an exported model, from what its run knows."""

import dataclasses
import importlib.resources
import json
import math
from typing import Any

import jinja2

from simplernn_jax.errors import counted
from simplernn_jax.export.formats import TrainedModel
from simplernn_jax.models.named_weights import named_weights
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.metrics import iterate_metrics

_TEMPLATE = importlib.resources.files(__package__) / "model_card.md"


def model_card(trained: TrainedModel, has_curve: bool) -> str:
    """Write the model card; `has_curve` refers to the picture of the loss."""
    model, data = trained.model.config, trained.config.data
    tokenizer = json.loads(trained.tokenizer.to_json())["kind"]
    template = jinja2.Template(
        _TEMPLATE.read_text("utf-8"), keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return template.render(
        title=trained.name,
        parameters=f"{sum(w.size for w in named_weights(trained.model).values()):,}",
        layers=counted(model.num_layers, "layer"),
        width=model.hidden_dim,
        mixers=", ".join(dict.fromkeys(model.mixers)),
        heads=counted(model.num_heads, "head"),
        data=f"Text: `{data.source}`. Tokenizer: {tokenizer}, {trained.tokenizer.vocab_size:,} "
        f"ids. Held out for validation: {data.validation_fraction:.0%} of the text.",
        results=_results(trained.workdir),
        has_curve=has_curve,
        is_chat=bool(data.template),
        config=json.dumps(dataclasses.asdict(trained.config), indent=2),
    )


def _results(workdir: str) -> str:
    """Return a table of the last row of training and of the best evaluation."""
    train: dict[str, Any] | None = None
    evaluations = []
    for row in iterate_metrics(workdir):
        if row["kind"] == "train":
            train = row
        elif row["kind"] == "validation" and row["loss"] is not None:
            evaluations.append(row)
    lines = ["| | |", "|---|---|"]
    if train is not None:
        lines.append(f"| steps | {train['step']:,} |")
        if train["tokens"] is not None:
            lines.append(f"| tokens of training | {train['tokens']:,} |")
    if evaluations:
        # That of the end scores all of the held-out text.
        best = max(evaluations, key=lambda row: (row["predictions"], -row["loss"]))
        bits_per_byte = best["bits_per_byte"] or math.inf  # which JSON lacks
        scores = Evaluation(best["loss"], bits_per_byte, best["predictions"])
        lines += [
            f"| held-out loss | {best['loss']:.4f} nats per token (step {best['step']:,}) |",
            f"| held-out perplexity | {scores.perplexity:.2f} |",
            f"| held-out bits per byte | {scores.bits_per_byte:.4f} |",
            f"| predictions scored | {best['predictions']:,} |",
        ]
    return "\n".join(lines) if len(lines) > 2 else "The export was made without the run's metrics."
