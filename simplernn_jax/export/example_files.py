"""What comes with two exported programs: their description, the tokenizer and an example."""

import json
import shutil
from pathlib import Path
from typing import Any

from simplernn_jax.data.tokenizer import ids_without_text
from simplernn_jax.export import example
from simplernn_jax.export.chat_format import chat_format
from simplernn_jax.export.formats import TrainedModel
from simplernn_jax.export.huggingface.tokenizer_file import library_tokenizer
from simplernn_jax.export.safetensors.exporter import description


def write_example(
    trained: TrainedModel, folder: Path, fields: dict[str, Any], readme: Path
) -> None:
    """Write ``config.json`` with `fields`, the tokenizer, the example and the README."""
    banned = ids_without_text(trained.tokenizer, trained.model.config.vocab_size)
    content = {
        **description(trained),
        "suppress_tokens": sorted(banned),
        "chat": chat_format(trained.config.data.template),
        "prefill_tokens": example.PREFILL_TOKENS,
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    (folder / "tokenizer.json").write_text(library_tokenizer(trained.tokenizer).to_str(), "utf-8")
    for path in (Path(example.__file__), readme):
        shutil.copyfile(path, folder / path.name)
