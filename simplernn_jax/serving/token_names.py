"""A distinct name for every token, as keys of log-probabilities."""

from collections import Counter

from simplernn_jax.data.tokenizer import Tokenizer


class TokenNames:
    """Names and bytes of the ids of a tokenizer.

    A token's name is its text; bytes that are part of a character are ``bytes:\\xNN``, as in
    OpenAI's API. Tokens without a text, or with one that another token has, are ``token_id:N``.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.bytes_of = [tokenizer.decode_bytes([number]) for number in range(vocab_size)]
        names = [_name(content) for content in self.bytes_of]
        uses = Counter(names)
        self.names = [
            name
            if name and uses[name] == 1 and not name.startswith("token_id:")
            else f"token_id:{i}"
            for i, name in enumerate(names)
        ]


def _name(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
