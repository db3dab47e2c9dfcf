"""Model card of an exported model, from what its run knows."""

import contextlib
import importlib.resources
import json
import math
import re
import textwrap
from typing import Any

import jinja2

from simplernn_jax.config import DataConfig, TrainConfig, to_json
from simplernn_jax.errors import UserError, counted, one_line
from simplernn_jax.export.chat_format import chat_format
from simplernn_jax.export.formats import TrainedModel
from simplernn_jax.inference import generate_text
from simplernn_jax.models.mixers.token_mixer import complete_options
from simplernn_jax.models.named_weights import named_weights
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.loop import SAMPLE_TEMPERATURE
from simplernn_jax.training.loss_curve import comparable
from simplernn_jax.training.metrics import read_metrics

_TEMPLATE = importlib.resources.files(__package__) / "model_card.md"


def model_card(trained: TrainedModel, has_curve: bool) -> str:
    """Write the model card; `has_curve` refers to the picture of the loss."""
    import huggingface_hub

    metadata = huggingface_hub.ModelCardData(
        license=trained.license or None,
        language=list(trained.languages) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["simplernn", "recurrent", "gated-linear-attention"],
    )
    rows = read_metrics(trained.workdir)
    scored = [row for row in rows if row.get("loss") is not None]
    best = min(comparable(scored), key=lambda x: (x["loss"], -x["step"]), default=None)
    for row in scored:  # of the same step, or the only one, and on all of the held-out text
        if row["kind"] == "held_out" and (best is None or row["step"] == best["step"]):
            best = row
    # Not HTML: what comes from elsewhere is escaped by these filters.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    environment.filters |= {"escaped": _escaped, "code_block": _code_block}
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        trained=trained,
        model=trained.model.config,
        attention=complete_options("attention", trained.model.config).mixer_options,
        metadata=metadata.to_yaml(),
        counted=counted,
        num_parameters=sum(weight.size for weight in named_weights(trained.model).values()),
        tokenizer=json.loads(trained.tokenizer.to_json())["kind"],
        last=next((row for row in reversed(rows) if row["kind"] == "train"), None),
        best=best,
        Evaluation=Evaluation,
        infinity=math.inf,
        has_curve=has_curve,
        sample=_sample(trained),
        config=to_json(trained.config),
    )


def _escaped(text: str) -> str:
    """Return a line of Markdown that shows `text` literally."""
    return re.sub(r"([!-,./:-@[-`{-~])", r"\\\1", one_line(text))


def _code_block(text: str) -> str:
    """Return an indented code block, which no text can end."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return textwrap.indent(text, "    ")


def _sample(trained: TrainedModel) -> dict[str, Any] | None:
    """Continue or answer the prompt of the run's own samples; None if the model cannot."""
    data, prompt = trained.config.data, trained.config.train.sample_prompt
    chat = chat_format(data.template)
    if prompt == TrainConfig.sample_prompt and data.source != DataConfig.source:
        prompt = "Hello!" if chat else ""
    settings: dict[str, Any] = {
        "max_new_tokens": 200,
        "temperature": 0.0 if chat else SAMPLE_TEMPERATURE,
    }
    for one in (prompt, ""):  # the tokenizer may not know the characters of the first
        with contextlib.suppress(UserError):
            read = one.strip().join(chat["first"]) if chat else one
            (text,) = generate_text(trained.model, trained.tokenizer, read, **settings)
            text = text.partition(chat["stop"])[0] if chat else text
            return {"prompt": one, "text": text, "is_chat": bool(chat), **settings}
    return None
