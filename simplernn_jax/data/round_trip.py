"""Whether a tokenizer gives back the text that it is given."""

from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from simplernn_jax.errors import UserError

_SAMPLE_CHARACTERS = 1 << 16
_QUOTED = 12
"""Characters quoted from the first difference on, and before it."""


def check_round_trip(tokenizer: Tokenizer, spec: str, corpus: Corpus) -> None:
    """Encode and decode the first 65,536 characters of a corpus.

    A model can neither learn nor generate what its tokenizer loses, and bits per byte would count
    bytes that it never predicts.

    Args:
      tokenizer: bytes and characters come back always, so only others are tried.
      spec: what the tokenizer is called, for the message.
      corpus: its documents are read from the first one on.

    Raises:
      UserError: with the first difference.
    """
    if isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        return
    left = _SAMPLE_CHARACTERS
    for document in corpus.documents():
        for piece in document.pieces:
            text = piece[:left]
            found = tokenizer.decode(tokenizer.encode(text))
            if found != text:
                raise UserError(
                    f"tokenizer {spec}: loses text: {_difference(text, found)} in {document.name}; "
                    "use one that gives back what it is given (byte-level, neither lower-casing "
                    "nor adding a space), or --config.data.tokenizer=byte"
                )
            left -= len(text)
            if not left:
                return


def _difference(text: str, found: str) -> str:
    pairs = enumerate(zip(text, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(found)))
    start = max(0, at - _QUOTED)
    before, after = (one[start : at + _QUOTED] for one in (text, found))
    return f"{before!r} comes back as {after!r} at character {at}"
