"""Bodies of requests: types, ranges and unknown fields are checked while JSON is parsed."""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

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
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
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
        what, _, path = str(error).partition(" - at `$")
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
