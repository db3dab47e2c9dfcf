"""Tokenizers in the format of Hugging Face, ``tokenizer.json``."""

import json
from typing import Any

from simplernn_jax.data.pretrained_tokenizer import byte_level_alphabet
from simplernn_jax.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from simplernn_jax.errors import UserError

NAMES = ("<|bos|>", "<|eos|>", "<|pad|>")


def tokenizer_json(tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """Return the text of ``tokenizer.json`` and the names of BOS, EOS and padding.

    The tokenizer adds BOS before a text, as generation here does.

    Raises:
      UserError: the special ids of a pretrained tokenizer are not supported.
    """
    from tokenizers import processors

    result = library_tokenizer(tokenizer)
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    names = _name_special_ids(result, ids)
    bos = names[0]
    result.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, ids[0])]
    )
    return result.to_str(pretty=True) + "\n", names


def library_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as `tokenizers.Tokenizer`, in which other special ids have no token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    saved = json.loads(tokenizer.to_json())
    if isinstance(tokenizer, ByteTokenizer):
        # Byte-level BPE without merges: a token for each byte.
        result = tokenizers.Tokenizer(models.BPE(byte_level_alphabet(), []))
        result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        result.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, CharTokenizer):
        # Words of one character; without an unknown token, other characters are errors.
        alphabet = {character: i for i, character in enumerate(saved["alphabet"])}
        result = tokenizers.Tokenizer(models.WordLevel(alphabet, unk_token="<|unknown|>"))  # noqa: S106
        every = tokenizers.Regex(r"[\s\S]")
        result.pre_tokenizer = pre_tokenizers.Split(every, "isolated")
        result.decoder = decoders.Fuse()
    else:
        result = tokenizers.Tokenizer.from_str(saved["tokenizer"])
        result.no_truncation()
        result.no_padding()
    return result


def _name_special_ids(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    """Add tokens for the special ids that have none; return the names of all."""
    import tokenizers

    names: dict[int, str] = {}
    for number, name in sorted(zip(ids, NAMES, strict=True)):
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
