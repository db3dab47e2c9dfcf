"""The tokenizer of a new run or of a checkpoint."""

import json

from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, alphabet_of
from simplernn_jax.errors import UserError


def load_tokenizer(spec: str, *corpora: Corpus | None) -> Tokenizer:
    """Create the tokenizer of a new run.

    Args:
      spec: ``byte``, ``char``, a path to a ``tokenizer.json``, or a name on the Hugging Face hub.
        Not ``bpe:SIZE``, which `prepare_corpus` trains.
      *corpora: read once for the alphabet of ``char``; unused by the others.

    Raises:
      UserError: an unreadable file, a name that is neither cached here nor within reach, ``char``
        without a corpus, or ``bpe`` without a size.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        given = [corpus for corpus in corpora if corpus is not None]
        if not given:
            raise UserError("tokenizer 'char' takes its alphabet from a corpus; none was given")
        return CharTokenizer(alphabet_of(given))
    if spec == "bpe":
        raise UserError("tokenizer 'bpe' needs a vocabulary size; use bpe:8192, for example")
    from simplernn_jax.data.pretrained_tokenizer import load_pretrained

    return load_pretrained(spec)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Restore a tokenizer from `Tokenizer.to_json`.

    Raises:
      UserError: corrupted, or of a kind that this version does not know.
    """
    try:
        values = json.loads(text)
        kind = values["kind"]
        if kind == "byte":
            return ByteTokenizer()
        if kind == "char":
            return CharTokenizer(values["alphabet"])
        if kind == "pretrained":
            from simplernn_jax.data.pretrained_tokenizer import PretrainedTokenizer

            return PretrainedTokenizer(values["tokenizer"], **values["special_ids"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"the saved tokenizer is corrupted ({error}); restore it from another checkpoint"
        ) from error
    raise UserError(f"the saved tokenizer is of kind {kind!r}; a newer version wrote it: use that")
