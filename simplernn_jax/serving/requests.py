"""Bodies of requests: types, ranges and unknown fields are checked while JSON is parsed."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

NAME_PATTERN = "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
MAX_PROMPTS = 256
MAX_CHOICES = 128
MAX_STOPS = 32
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
CHAT_TOKENS = 1024
"""New tokens of a chat completion, or of an infill, that asks for no number."""

TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
StateName = Annotated[str, Meta(pattern=NAME_PATTERN)]
Stop = Annotated[str, Meta(max_length=1024)]
Prompt = str | list[TokenId]
Nothing = Annotated[list[Any], Meta(max_length=0)]

_Body = TypeVar("_Body")


class RequestError(Exception):
    """A request that cannot be answered, with the status of the response."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status

    @property
    def param(self) -> str | None:
        """The field with whose name the message begins."""
        field = re.match(r"(\w{1,100}): ", self.message)
        return field and field[1]


class Around(NamedTuple):
    """What is around a text to fill in."""

    prefix: str
    suffix: str
    extra: Sequence[str] = ()
    """Other texts, before all of it."""


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
    metadata: Any = None
    parallel_tool_calls: bool | None = None
    service_tier: str | None = None
    store: bool | None = None
    """Accepted for compatibility like `user`: they change nothing."""
    function_call: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Nothing | None = None
    """Accepted for compatibility if they ask for nothing but text."""

    def __post_init__(self) -> None:
        """Check rules of several fields."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: only with stream")

    @property
    def stops(self) -> list[str]:
        """The stop strings that are not empty."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]


class CompletionRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str | TokenId | list[TokenId]] | None = None
    """A text, texts, token ids, or lists of them; null is an empty text."""
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = 16
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    """Text after the completion."""

    def __post_init__(self) -> None:
        """Check rules of several fields."""
        super().__post_init__()
        if self.best_of not in (None, self.n or 1):
            raise RequestError("best_of: only the value of n is supported")
        if isinstance(self.prompt, list) and len({type(one) for one in self.prompt}) > 1:
            raise RequestError("prompt: its items have several types")
        if len(self.prompts) > MAX_PROMPTS:
            raise RequestError(f"prompt: over {MAX_PROMPTS} prompts")
        if self.suffix and (self.echo or not all(isinstance(x.prefix, str) for x in self.prompts)):
            raise RequestError("suffix: only with prompts that are strings, and without echo")

    @property
    def length(self) -> int:
        """Maximum number of new tokens."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives of each token; None without log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[Any]:
        """All prompts, each of type `Prompt`, or `Around` with a suffix."""
        prompts: list[Any] = ["" if self.prompt is None else self.prompt]
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            prompts = self.prompt
        return [Around(x, self.suffix) for x in prompts] if self.suffix else prompts


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

    def for_template(self) -> dict[str, str]:
        """Return the message as templates know it: ``developer`` is a later name of ``system``."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: ClassVar[bool] = False
    """An answer never begins with the conversation."""

    def __post_init__(self) -> None:
        """Check rules of several fields."""
        super().__post_init__()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError("max_tokens: leave it out with max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: only with logprobs")

    @property
    def length(self) -> int:
        """Maximum number of new tokens."""
        return self.max_completion_tokens or self.max_tokens or CHAT_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives of each token; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ExtraText(msgspec.Struct):
    """Context of an infill, such as a part of another file; other fields are not used."""

    text: str


class InfillRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /infill``, with the fields of llama.cpp's server."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraText] = []
    prompt: str = ""
    """Text of the line before the cursor: the end of the prefix."""
    n_predict: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] = -1
    """Maximum number of new tokens; -1 is `CHAT_TOKENS`."""
    t_max_prompt_ms: Annotated[float, Meta(le=1e9)] = 0
    """Milliseconds after which context is left out of the prompt; 0 and less are off."""
    t_max_predict_ms: Annotated[float, Meta(le=1e9)] = 0
    """Milliseconds of new tokens; 0 and less are off."""
    response_fields: list[str] | None = None
    """Paths of the fields of the answer; None is all of it."""
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=10)] | None = msgspec.field(
        name="repeat_penalty", default=None
    )
    echo: ClassVar[bool] = False
    num_logprobs: ClassVar[None] = None

    IGNORED: ClassVar = re.compile(
        "id_slot|cache_prompt|n_indent|samplers|dynatemp_.*|typical_p|repeat_last_n|dry_.*|xtc_.*|lora|"
        "mirostat.*|top_n_sigma|min_keep|n_keep|n_discard|n_cache_reuse|return_tokens|"
        "return_progress|timings_per_token|sse_ping_interval"
    )
    """Fields of llama.cpp that tune what this server does not have."""

    def __post_init__(self) -> None:
        """Check rules of several fields."""
        super().__post_init__()
        if self.seed == -1:  # random, as in llama.cpp
            self.seed = None
        self.model = self.model or None  # llama.vim sends an empty name

    @property
    def length(self) -> int:
        """Maximum number of new tokens."""
        return CHAT_TOKENS if self.n_predict < 0 else self.n_predict

    @property
    def prompts(self) -> list[Any]:
        """The one prompt, an `Around`."""
        extra = [text.text for text in self.input_extra]
        return [Around(self.input_prefix + self.prompt, self.input_suffix, extra)]


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

    prompt: Prompt = ""
    parent: StateName | None = None
    name: StateName | None = None


JobRequest = CompletionRequest | ChatRequest | InfillRequest | StateRequest
"""A request that becomes jobs."""
AnyRequest = TypeVar("AnyRequest", bound=JobRequest)


def parse(kind: type[_Body], body: bytes) -> _Body:
    """Parse JSON as `kind`; `RequestError` for unknown fields, other types, values out of range."""
    try:
        if not issubclass(kind, InfillRequest):
            return msgspec.json.decode(body, type=kind)
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        known = {name: fields[name] for name in fields if not kind.IGNORED.fullmatch(name)}
        return msgspec.json.decode(msgspec.json.encode(known), type=kind)
    except msgspec.ValidationError as error:
        what = str(error)
        field = re.search(r"\$\.(\w+)", what) or re.search("field `(.*)`", what, re.DOTALL)
        what, _, _ = what.partition(" - at `")
        raise RequestError(f"{field[1]}: {what}" if field else what) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON that can be read: {error}") from error
