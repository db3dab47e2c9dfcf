"""Weights, code, tokenizer, generation settings and a model card for `transformers`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.data.chat_template import ChatTemplate
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.export import safetensors
from simplernn_jax.export.formats import (
    TrainedModel,
    check_architecture,
    check_packages,
    description,
    library_tokenizer,
    write_json,
)
from simplernn_jax.export.huggingface.model_card import model_card

CODE = "modeling_simplernn.py"
NAMES = ("<|bos|>", "<|eos|>", "<|pad|>", "<|fim_suffix|>", "<|fim_prefix|>", "<|fim_middle|>")
"""Names of special tokens that have none."""
_NO_SPECIAL_TOKENS = "{%- set bos_token = '' %}{%- set eos_token = '' %}\n"
"""Begins a template: special tokens are no text, here and in the exported tokenizer."""


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the files."""
    check_architecture("huggingface", trained.model)
    check_packages("huggingface", "torch", "transformers")
    safetensors.write(trained, folder)
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
    tokenizer, template = trained.tokenizer, trained.config.data.template
    text, names = tokenizer_json(tokenizer)
    (folder / "tokenizer.json").write_text(text, "utf-8")
    fields, module = description(trained), Path(CODE).stem
    classes = {
        "architectures": ["SimpleRNNForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.SimpleRNNConfig",
            "AutoModelForCausalLM": f"{module}.SimpleRNNForCausalLM",
        },
    }
    write_json(folder / "config.json", {**fields, **classes})
    turn_end = _turn_end(template, tokenizer)
    generation = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if turn_end:
        generation["eos_token_id"] = [tokenizer.eos_id, *turn_end]
    write_json(folder / "generation_config.json", {"do_sample": True, **generation})
    end_text = tokenizer.decode(turn_end)
    is_control = not (end_text.isprintable() or end_text.isspace())  # decoded text leaves it out
    library = library_tokenizer(tokenizer)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict(zip(("bos_token", "eos_token", "pad_token"), names, strict=True)),
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            # As here, no text can end a document.
            "split_special_tokens": True,
            "additional_special_tokens": [library.id_to_token(n) for n in turn_end if is_control],
            "model_max_length": 10**9,
        },
    )
    if template:
        (folder / "chat_template.jinja").write_text(_NO_SPECIAL_TOKENS + template, "utf-8")
    (folder / "README.md").write_text(model_card(trained), "utf-8")


def _turn_end(template: str, tokenizer: Tokenizer) -> list[int]:
    """Return the id that ends an assistant's message, if it is a single one."""
    if not template:
        return []
    try:
        ids = tokenizer.encode(ChatTemplate(template).stop).tolist()
    except UserError:  # a character that the run has never seen
        return []
    return ids if len(ids) == 1 else []


def tokenizer_json(tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """Return the text of ``tokenizer.json`` and the names of BOS, EOS and padding.

    The tokenizer adds BOS before a text, as generation here does.

    Raises:
      UserError: the special ids of a pretrained tokenizer are not supported.
    """
    from tokenizers import processors

    result = library_tokenizer(tokenizer)
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.fim_ids)
    names = _name_special_ids(result, ids)
    bos = names[0]
    result.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, ids[0])]
    )
    return result.to_str(pretty=True) + "\n", names[:3]


def _name_special_ids(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    """Add tokens for the special ids that have none; return the names of all."""
    import tokenizers

    names: dict[int, str] = {}
    for number, name in sorted(zip(ids, NAMES, strict=False)):
        known = tokenizer.id_to_token(number)
        if known is None:
            tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True)])
            known = name
        if tokenizer.token_to_id(known) != number:
            raise UserError(
                f"--format=huggingface: the id {number} of {name} is not next in the vocabulary "
                "of the tokenizer, which is not supported by this format; use another format"
            )
        names[number] = known
    return [names[number] for number in ids]


class _Loaded:
    def __init__(self, folder: Path) -> None:
        import transformers

        from simplernn_jax.export.huggingface.modeling_simplernn import SimpleRNNForCausalLM

        transformers.utils.logging.disable_progress_bar()
        # The classes themselves: the Auto classes would leave a copy of the code in a cache.
        self._model = SimpleRNNForCausalLM.from_pretrained(folder)
        self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self._model(torch.tensor(tokens[None]).long()).logits[0].numpy()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


load = _Loaded
