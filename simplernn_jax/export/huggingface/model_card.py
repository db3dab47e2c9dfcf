"""Model card of an exported model, from what its run knows."""

import json
import math
import re
import textwrap
from typing import Any

from simplernn_jax.config import to_json
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.errors import UserError, counted, one_line
from simplernn_jax.export.formats import TrainedModel
from simplernn_jax.inference import Conversation, generate_text
from simplernn_jax.models.pytorch_weights import named_weights
from simplernn_jax.training.metrics import comparable, read_metrics

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [simplernn, recurrent, gated-linear-attention]
{stated}---

# {name}

A recurrent language model with {parameters:,} parameters, trained with simplernn_jax: {layers} of
width {width} ({mixers}), with {heads}. The state of the recurrence is a matrix per head, as in
[gated linear attention](https://arxiv.org/abs/2312.06635).

## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file, or the name of its repository on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
{prompt}
inputs = tokenizer(text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=200)[0]
print(tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`trust_remote_code=True` runs `modeling_simplernn.py` from this folder, which needs PyTorch and
`transformers` only. With simplernn_jax installed, `load_model(folder)` loads the model, too.

## Example

{sample}

## Training data and results

| | |
|---|---|
{facts}

## License

{license} The code in `modeling_simplernn.py` is
licensed under Apache-2.0.

## Limitations

The model imitates the text that it was trained on. It can reproduce passages of that text, and what
it states can be false. It was not evaluated for any application.

## Training configuration

```json
{config}
```
"""
_NO_LICENSE = (
    "No license was stated for the weights. Ask the author before you use or redistribute them."
)
_CHAT_PROMPT = """\
messages = [{"role": "user", "content": "Hello!"}]
# Tokenize the rendered text, because the tokenizer adds BOS and apply_chat_template does not.
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"""


def model_card(trained: TrainedModel) -> str:
    """Write the model card."""
    model, data = trained.model.config, trained.config.data
    stated = {"license": trained.license, "language": list(trained.languages)}
    license = f"The license of the weights is {_escaped(trained.license)}."
    facts = {
        "text": _escaped(data.source),
        "language": _escaped(", ".join(trained.languages) or "not stated"),
        "held out for validation": f"{data.validation_fraction:.0%} of the text",
        "tokenizer": f"{json.loads(trained.tokenizer.to_json())['kind']}, with a vocabulary of "
        f"{trained.tokenizer.vocab_size:,} tokens",
        **_results(trained.workdir),
    }
    return _CARD.format(
        # JSON values are YAML, whatever the text.
        stated="".join(f"{name}: {json.dumps(x)}\n" for name, x in stated.items() if x),
        license=license if trained.license else _NO_LICENSE,
        sample=_sample(trained),
        name=_escaped(trained.name),
        parameters=sum(weight.size for weight in named_weights(trained.model).values()),
        layers=counted(model.num_layers, "layer"),
        width=model.hidden_dim,
        heads=counted(model.num_heads, "head"),
        mixers=" and ".join(dict.fromkeys(model.mixers)).replace("simple_rnn", "recurrence"),
        prompt=_CHAT_PROMPT if data.template else 'text = "The beginning of a text"',
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        config=to_json(trained.config),
    )


def _sample(trained: TrainedModel) -> str:
    """Return the greedy continuation of the run's sample prompt, or the answer of a chat model."""
    settings: dict[str, Any] = {"max_new_tokens": 100, "temperature": 0.0}
    prompt, template = trained.config.train.sample_prompt, trained.config.data.template
    try:
        if template:
            prompt = prompt or "Hello!"
            chat = Conversation(trained.model, trained.tokenizer, ChatTemplate(template))
            text = f"{prompt}\n{chat.ask(prompt, **settings)}"
        else:
            text = prompt + generate_text(trained.model, trained.tokenizer, prompt, **settings)[0]
    except (UserError, TemplateError) as error:
        return f"No text was generated for this card ({_escaped(str(error))})."
    # An indented code block, which no text can end.
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return f"A prompt, and what the model generates (greedy):\n\n{textwrap.indent(text, '    ')}"


def _results(workdir: str) -> dict[str, str]:
    """Return the length of the training run and the results of its best evaluation."""
    rows = read_metrics(workdir)
    facts = {}
    for row in rows:
        if row["kind"] == "train":
            facts["steps of the training run"] = f"{row['step']:,}"
    scored = [row for row in rows if row.get("loss") is not None]
    best = min(comparable(scored), key=lambda row: (row["loss"], -row["step"]), default=None)
    for row in scored:  # of the same step, or the only one, and on all of the held-out text
        if row["kind"] == "held_out" and (best is None or row["step"] == best["step"]):
            best = row
    if best is not None:
        facts["held-out loss"] = f"{best['loss']:.4f} nats per token (step {best['step']:,})"
        facts["held-out perplexity"] = f"{math.exp(best['loss']):.2f}"
        if best.get("bits_per_byte") is not None:
            facts["held-out bits per byte"] = f"{best['bits_per_byte']:.4f}"
        facts["held-out tokens scored"] = f"{best['predictions']:,}"
    return facts


def _escaped(text: str) -> str:
    """Return a line of Markdown that shows `text` literally."""
    return re.sub(r"([!-,./:-@[-`{-~])", r"\\\1", one_line(text))
