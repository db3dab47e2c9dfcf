"""Bodies of requests, and what they mean for the model.

Types, ranges and unknown fields are checked while JSON is parsed; ids by `Inputs`.
"""

import hashlib
import re
import secrets
from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from simplernn_jax.data.tokenizer import Tokenizer, ids_without_text
from simplernn_jax.errors import UserError
from simplernn_jax.inference.sampling import Sampling

NAME_PATTERN = "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
MAX_PROMPTS = 256
MAX_CHOICES = 128
MAX_STOPS = 32
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1

TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
StateName = Annotated[str, Meta(pattern=NAME_PATTERN)]
Stop = Annotated[str, Meta(max_length=1024)]
Prompt = str | list[TokenId]
_PROMPT_SCHEMA = msgspec.json.schema(str | list[Prompt | TokenId] | None)
_FewPrompts = msgspec.defstruct(
    "_FewPrompts",
    [(f"prompt{number}", msgspec.Raw, None) for number in range(MAX_PROMPTS)],
    array_like=True,
    forbid_unknown_fields=True,
)
"""A list whose items are not parsed, so that one that is too long is rejected at once."""
_NEUTRAL = {
    "function_call": (b'"none"', b'"auto"'),
    "functions": (b"[]",),
    "response_format": (b'{"type":"text"}',),
    "tool_choice": (b'"none"', b'"auto"'),
    "tools": (b"[]",),
}
"""Values, as compact JSON, with which fields of OpenAI's API ask for nothing but text."""
_TYPES = {"array": "list", "float": "number", "int": "integer", "str": "string"}
"""Names of types in errors."""
_SAMPLING = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields that `Sampling` has too, with the same defaults."""
_UNPARSED: Any = msgspec.field(default_factory=lambda: msgspec.Raw(b"null"))


class RequestError(Exception):
    """A request that cannot be answered; an OpenAI error object with `status`."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted for compatibility: nothing is ever obfuscated."""


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that completions and chat completions share."""

    model: str | None = None
    state: StateName | None = None
    """Name of a state to continue."""
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None = None
    """0 and -1 are off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=10)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    banned_token_ids: Annotated[list[TokenId], Meta(max_length=4096)] | None = None
    ignore_eos: bool = False
    user: str | None = None
    metadata: msgspec.Raw = _UNPARSED
    parallel_tool_calls: bool | None = None
    service_tier: str | None = None
    store: bool | None = None
    """Accepted for compatibility like `user`: they change nothing."""
    function_call: msgspec.Raw = _UNPARSED
    functions: msgspec.Raw = _UNPARSED
    response_format: msgspec.Raw = _UNPARSED
    tool_choice: msgspec.Raw = _UNPARSED
    tools: msgspec.Raw = _UNPARSED
    """Accepted for compatibility if they ask for nothing but text."""

    def __post_init__(self) -> None:
        """Reject values that ask for more than text."""
        for name, neutral in _NEUTRAL.items():
            if msgspec.json.format(getattr(self, name), indent=-1) not in (b"null", *neutral):
                supported = b" or ".join(neutral).decode()
                raise RequestError(f"{name}: only {supported} is supported", param=name)


class CompletionRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[msgspec.Raw, Meta(extra_json_schema=_PROMPT_SCHEMA)] = _UNPARSED
    """A text, texts, token ids, or lists of them, for `parse_prompts`; null is an empty text."""
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = 16
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """Part of a message."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    """As in the messages of answers, which clients send back."""

    @property
    def template_role(self) -> str:
        """The role as templates know it: ``developer`` is a later name of ``system``."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /tokenize``."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /detokenize``."""

    tokens: list[TokenId]
    model: str | None = None


class StateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /v1/states``: a text or tokens, after a parent or from the beginning."""

    prompt: str | list[TokenId] = ""
    parent: StateName | None = None
    name: StateName | UnsetType = UNSET


class ForkRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /v1/states/{id}/fork``."""

    name: StateName | UnsetType = UNSET


def parse(kind: type, body: bytes) -> Any:
    """Parse JSON as `kind`; `RequestError` for unknown fields, other types, values out of range."""
    return _decode(kind, body or b"null", "")


def parse_prompts(prompt: msgspec.Raw) -> list[str | list[int]]:
    """Parse the prompts of a completion; `RequestError` for too many, or for other types."""
    if not re.match(rb'\s*\[\s*["[]', prompt):
        one = _decode(Prompt | None, prompt, "prompt")
        return ["" if one is None else one]
    several = msgspec.structs.astuple(_decode(_FewPrompts, prompt, "prompt"))
    return [_decode(Prompt, one, "prompt") for one in several if one is not None]


def _decode(kind: Any, content: bytes | msgspec.Raw, where: str) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).replace("`key` in `$", "`$").partition(" - at `$")
        where = (where + path).strip(".`")
        if field := re.fullmatch("Object .* (unknown|required) field `(.*)`", what, re.DOTALL):
            what, where = f"{field[1]} field", f"{where}.{field[2]}".lstrip(".")

        def in_words(types: re.Match[str]) -> str:
            return " or ".join(_TYPES.get(name, name) for name in types[1].split(" | "))

        what = re.sub("`(.*?)`", in_words, what.replace("Invalid enum value", "Invalid value"))
        message = f"{where or 'the body'}: {what[0].lower()}{what[1:]}"
        raise RequestError(message, param=re.split(r"[.[]", where)[0] or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON that can be read: {error}") from error


class Inputs:
    """Conversion of requests for one vocabulary, at least as large as the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._banned_ids = ids_without_text(tokenizer, vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Encode `text`; raises `RequestError` if the tokenizer cannot."""
        try:
            return self._tokenizer.encode(text)
        except UserError as error:
            raise RequestError(str(error), param="prompt") from error

    def prompts(self, request: CompletionRequest) -> list[tuple[str, np.ndarray]]:
        """Return echoed text and ids of each prompt; raises `RequestError` for wrong ones."""
        several = parse_prompts(request.prompt)
        ids = [self.prompt(one, request.state is not None) for one in several]
        if not request.echo:
            return [("", one) for one in ids]
        texts = [p if isinstance(p, str) else self._tokenizer.decode(p) for p in several]
        return list(zip(texts, ids, strict=True))

    def prompt(self, prompt: str | list[int], has_state: bool) -> np.ndarray:
        """Return the ids of a prompt; a text begins with BOS unless it continues a state."""
        if isinstance(prompt, str):
            ids = self.encode(prompt)
            if not has_state:
                ids = np.concatenate([[self._tokenizer.bos_id], ids])
            return ids.astype(np.int32)
        self.check_ids("prompt", prompt)
        if not prompt and not has_state:
            raise RequestError("prompt: a list of token ids is empty", param="prompt")
        return np.array(prompt, np.int32)

    def check_ids(self, param: str, ids: Collection[int]) -> None:
        """Check that all ids are in the vocabulary."""
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise RequestError(
                f"{param}: token {largest} is outside the vocabulary of {self._vocab_size}",
                param=param,
            )

    def sampling(self, request: SamplingFields) -> Sampling:
        """Convert settings; `RequestError` for ids outside the vocabulary, or if all are banned."""
        stop_ids, banned = request.stop_token_ids or [], request.banned_token_ids or []
        self.check_ids("stop_token_ids", stop_ids)
        self.check_ids("banned_token_ids", banned)
        self.check_ids("logit_bias", request.logit_bias or [])
        if len(self._banned_ids.union(banned)) >= self._vocab_size:
            raise RequestError(
                "banned_token_ids: leave at least one token", param="banned_token_ids"
            )
        if not request.ignore_eos:
            stop_ids = [*stop_ids, self._tokenizer.eos_id]
        given = {name: getattr(request, name) for name in _SAMPLING}
        return Sampling(
            **{name: value for name, value in given.items() if value is not None},
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=max(0, min(request.top_k or 0, self._vocab_size)),
            logit_bias=request.logit_bias or {},
            banned_ids=tuple(sorted(self._banned_ids.union(banned))),
            stop_ids=tuple(sorted({*stop_ids})),
            seed=_seed(request.seed),
        )


def _seed(seed: int | None) -> int:
    """Seed of 32 bits: of a larger or negative one, a digest; of none, a random one."""
    if seed is None:
        return secrets.randbits(32)
    if 0 <= seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
