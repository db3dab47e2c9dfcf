"""Text in, token ids out: corpora, tokenizers and the tokenized corpus on disk."""

from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.token_store import TokenizedCorpus, TokenSplit, prepare_corpus
from simplernn_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_json

__all__ = [
    "TokenSplit",
    "TokenizedCorpus",
    "Tokenizer",
    "load_tokenizer",
    "open_corpus",
    "prepare_corpus",
    "tokenizer_from_json",
]
