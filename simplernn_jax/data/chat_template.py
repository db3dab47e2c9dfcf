"""Conversations as text, by a Jinja template in the form of Hugging Face's ``chat_template``."""

import itertools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from simplernn_jax.data.documents import Piece, cut_text, pieces_of
from simplernn_jax.data.template_process import PROCESS, Message, TemplateError
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file

__all__ = ["ChatTemplate", "Message", "TemplateError", "load_template", "messages_of"]

_NAMES = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES = {"role": _NAMES, "from": {"human": "user", "gpt": "assistant"} | _NAMES}
"""Roles by the field of a message, and by their name in it."""

_BUILT_IN = {
    "roles": """\
{%- set tokens = {'system': '\\x01', 'user': '\\x02', 'assistant': '\\x03'} -%}
{%- for message in messages -%}
{%- for token in ['\\x01', '\\x02', '\\x03', '\\x04']
    if token in message.content and message.role != 'assistant' -%}
{{ raise_exception('a message contains one of the control characters U+0001 to U+0004') }}
{%- endfor -%}
{{ tokens[message.role] ~ message.content ~ '\\x04' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ tokens['assistant'] }}{% endif -%}
"""
}
"""Templates by name. In ``roles``, a message is a control character for its role, its content, and
U+0004 (end of transmission): one token each in byte-level vocabularies, and absent from text."""

_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
)
_SHORT_MESSAGE = 256
"""Longest message, in characters, whose rendering is kept."""
_MAX_KEPT = 1 << 14


def load_template(spec: str) -> str:
    """Return the text of a template.

    Args:
      spec: ``roles``, the path of a Jinja file, or the text itself.

    Raises:
      UserError: no such file, or the template cannot be used.
    """
    text = _BUILT_IN.get(spec, spec)
    if "{{" not in text:
        try:
            text = read_file(os.path.expanduser(spec)).decode("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"--config.data.template={spec}: {reason}; name a Jinja file, or use "
                f"{' or '.join(_BUILT_IN)}"
            ) from error
    ChatTemplate(text)
    return text


class ChatTemplate:
    """A template that renders messages one after another.

    Variables are those of Hugging Face's templates: ``messages``, ``add_generation_prompt``, and
    ``bos_token`` and ``eos_token``, which are empty, since BOS begins and EOS ends every document.

    Args:
      source: its text. It runs in another process, in a sandbox with limits on time and memory.

    Raises:
      UserError: it is not a template, or a message changes what was rendered before it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        # Short messages come again and again, and rendering takes most of the time of reading.
        self._kept: dict[tuple[str, str], str] = {}
        opening = _PROBE[:1]
        try:
            self._prefix, self._asked, opened, asked = PROCESS.render(
                source,
                [(_PROBE, False), ((*_PROBE, *opening), True), (opening, False), (opening, True)],
            )
            self._generation_prompt = self._after(opened, asked)
            self.end_of_turn = self._after(asked + _PROBE[1]["content"], self._prefix)
            """Text that ends an assistant's message."""
            self.stop = self.end_of_turn.strip(" ")
            """The part of it that ends generation."""
        except TemplateError as error:
            raise UserError(f"chat template: {error}; correct --config.data.template") from error
        if not self.stop:
            raise UserError(
                "chat template: nothing ends an assistant's message; correct --config.data.template"
            )

    def __reduce__(self) -> tuple[type["ChatTemplate"], tuple[str]]:
        return ChatTemplate, (self.source,)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render messages and, if wanted, the beginning of an answer; raises `TemplateError`."""
        return PROCESS.render(self.source, [(messages, add_generation_prompt)])[0]

    def render_next(self, messages: Sequence[Message]) -> str:
        """Render messages after a finished conversation, and a generation prompt, as `render`."""
        whole = self.render((*_PROBE, *messages), add_generation_prompt=True)
        return self._after(self._prefix, whole)

    def pieces(
        self, conversations: Sequence[Sequence[Message]], *, only_assistant: bool
    ) -> Iterator[list[Piece] | TemplateError]:
        """Render conversations together, which is faster; yield the pieces of each, or its error.

        With `only_assistant`, only what the assistant writes, the end of its turn included, is a
        target.
        """
        cutting = [self._cut(messages, only_assistant) for messages in conversations]
        needed = [next(cut) for cut in cutting]
        try:
            texts = iter(PROCESS.render(self.source, list(itertools.chain(*needed))))
        except TemplateError:
            texts = None  # one by one, each has its own error
        for cut, renderings in zip(cutting, needed, strict=True):
            try:
                if texts is None:
                    cut.send(PROCESS.render(self.source, renderings))
                else:
                    cut.send(list(itertools.islice(texts, len(renderings))))
            except StopIteration as end:
                yield end.value
            except TemplateError as error:
                yield error

    def _cut(
        self, messages: Sequence[Message], only_assistant: bool
    ) -> Generator[list[tuple[Sequence[Message], bool]], list[str], list[Piece]]:
        """Yield the renderings that a conversation needs, take their texts, return its pieces."""
        roles = [message["role"] for message in messages]
        if not only_assistant or "assistant" not in roles:
            (whole,) = yield [(messages, False)]
            return list(pieces_of(cut_text(whole, not only_assistant)))
        first = roles.index("assistant")
        keys = [(message["role"], message["content"]) for message in messages[first:]]
        alone = {key: text for key in keys if (text := self._kept.get(key)) is not None}
        new = [key for key in dict.fromkeys(keys) if key not in alone]
        # Many templates cannot render a conversation without messages.
        heads = [messages[:first]] if first else []
        whole, *texts = yield [(one, False) for one in (messages, *heads, *map(_after_probe, new))]
        for key, text in zip(new, texts[len(heads) :], strict=True):
            alone[key] = self._after(self._asked if key[0] == "assistant" else self._prefix, text)
            if len(key[1]) <= _SHORT_MESSAGE:
                self._kept[key] = alone[key]
        if len(self._kept) > _MAX_KEPT:
            self._kept.clear()
        parts: list[tuple[str, bool]] = []
        for key in keys:
            is_assistant = key[0] == "assistant"
            prompt = self._generation_prompt if is_assistant else ""
            parts += [(prompt, False), (alone[key], is_assistant)]
        rest = "".join(text for text, _ in parts)
        before = whole[: len(whole) - len(rest)]
        if before + rest != whole or any(before != text for text in texts[: len(heads)]):
            raise TemplateError("a message is not rendered alike everywhere in a conversation")
        return list(pieces_of(one for part in [(before, False), *parts] for one in cut_text(*part)))

    @staticmethod
    def _after(before: str, whole: str) -> str:
        if not whole.startswith(before):
            raise TemplateError("a message changes what the template renders for those before it")
        return whole[len(before) :]


def messages_of(record: Mapping[str, Any], field: str = "messages") -> list[Message]:
    """Return the messages of a record.

    They are in `field`, in the form of OpenAI or ShareGPT. A record without ``messages`` may be of
    ShareGPT (``conversations``) or of Alpaca (``instruction`` and ``output``) instead.

    Raises:
      TemplateError: it has none of these fields, or something else in them.
    """
    if field in record:
        return _checked(record[field])
    if field == "messages" and "conversations" in record:
        messages = _checked(record["conversations"])
    elif field == "messages" and {"instruction", "output"} <= record.keys():
        messages = _alpaca_messages(record)
    else:
        others = "" if field != "messages" else ", 'conversations' or 'instruction' and 'output'"
        found = ", ".join(itertools.islice(record, 8)) or "none"
        raise TemplateError(
            f"no field {field!r}{others}; it has {found}: name the one with the messages "
            "by field=NAME (train.py: --config.data.field=NAME)"
        )
    if record.get("system"):
        messages = _checked([{"role": "system", "content": record["system"]}]) + messages
    return messages


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise TemplateError("messages are not a list of at least one")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TemplateError(f"message {number} is of type {type(message).__name__}")
        name, text_name = ("from", "value") if "from" in message else ("role", "content")
        role, content = message.get(name), message.get(text_name)
        if not isinstance(role, str) or role not in _ROLES[name]:
            known = ", ".join(_ROLES[name])
            raise TemplateError(f"message {number} has the role {role!r}; known are {known}")
        if not isinstance(content, str):
            raise TemplateError(f"message {number} has no text as its {text_name}")
        found.append({"role": _ROLES[name][role], "content": content})
    return found


def _alpaca_messages(record: Mapping[str, Any]) -> list[Message]:
    fields = {name: record.get(name) for name in ("instruction", "input", "output")}
    fields["input"] = fields["input"] or ""
    for name, text in fields.items():
        if not isinstance(text, str):
            raise TemplateError(f"field {name!r} is of type {type(text).__name__}, not text")
    history = record.get("history") or []
    if not isinstance(history, list) or any(type(x) is not list or len(x) != 2 for x in history):
        raise TemplateError("field 'history' is not a list of pairs of question and answer")
    question = "\n".join(filter(None, (fields["instruction"], fields["input"])))
    return _checked(
        [
            {"role": role, "content": text}
            for turn in [*history, [question, fields["output"]]]
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    )


def _after_probe(message: tuple[str, str]) -> Sequence[Message]:
    """Return a conversation that ends with a message."""
    role, content = message
    before = (*_PROBE, _PROBE[0]) if role == "assistant" else _PROBE
    return *before, {"role": role, "content": content}
