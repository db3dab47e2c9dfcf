"""Conversations as text, by a Jinja template in the form of Hugging Face's ``chat_template``."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jinja2

from simplernn_jax.data.documents import Piece, text_pieces
from simplernn_jax.data.template_sandbox import LimitError, compiled, limits
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file

Message = dict[str, str]
"""``role`` and ``content``, as in OpenAI's API."""

ROLES = ("system", "user", "assistant")

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
"""Characters of a message whose rendering is kept at most."""


class TemplateError(Exception):
    """Reason why messages cannot be rendered."""


def load_template(spec: str) -> str:
    """Return the text of a template.

    Args:
      spec: ``roles``, the path of a Jinja file, or the text itself.

    Raises:
      UserError: no such file, or it is no template that can be used.
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
      source: its text. It runs in a sandbox with bounds on time and memory.

    Raises:
      UserError: it is no template, or a message changes what was rendered before it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = compiled(source)
        except Exception as error:  # of Jinja, or of Python's compiler, which gets deep nesting
            reason = str(error) if isinstance(error, jinja2.TemplateError) else repr(error)
            raise UserError(f"chat template: {reason}; correct --config.data.template") from error
        try:
            self._prefix = self.render(_PROBE)
            asked = self.render(_PROBE[:1], add_generation_prompt=True)
            self._generation_prompt = self._after(self.render(_PROBE[:1]), asked)
            self.end_of_turn = self._after(asked + _PROBE[1]["content"], self._prefix)
            """Text that ends an assistant's message."""
            self.stop = self.end_of_turn.strip(" ")
            """The part of it that ends generation."""
        except TemplateError as error:
            raise UserError(f"chat template: {error}; correct --config.data.template") from error
        # Short messages come again and again, and rendering takes most of the time of reading.
        self._render_short = functools.lru_cache(1 << 14)(self._rendered_alone)
        if not self.stop:
            raise UserError(
                "chat template: nothing ends an assistant's message; correct --config.data.template"
            )

    def __reduce__(self) -> tuple[type["ChatTemplate"], tuple[str]]:
        return ChatTemplate, (self.source,)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render messages and, if wanted, the beginning of an answer; raises `TemplateError`."""
        try:
            with limits(sum(len(message["content"]) for message in messages)):
                return self._template.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    bos_token="",
                    eos_token="",
                    raise_exception=_raise_exception,
                )
        except TemplateError:
            raise
        except LimitError as error:
            raise TemplateError(str(error)) from error
        except Exception as error:  # a template can fail in any way
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def render_next(self, messages: Sequence[Message]) -> str:
        """Render messages after a finished conversation, and a generation prompt, as `render`."""
        whole = self.render((*_PROBE, *messages), add_generation_prompt=True)
        return self._after(self._prefix, whole)

    def pieces(self, messages: Sequence[Message], *, only_assistant: bool) -> Iterator[Piece]:
        """Cut a rendered conversation into pieces.

        With `only_assistant`, only what the assistant writes, the end of its turn included, is a
        target. Raises what `render` does.
        """
        whole = self.render(messages)
        if not only_assistant:
            yield from text_pieces(whole)
            return
        first = next((i for i, one in enumerate(messages) if one["role"] == "assistant"), None)
        if first is None:
            yield from text_pieces(whole, is_target=False)
            return
        parts: list[tuple[str, bool]] = []
        for message in messages[first:]:
            is_assistant = message["role"] == "assistant"
            content = message["content"]
            is_short = len(content) <= _SHORT_MESSAGE
            render = self._render_short if is_short else self._rendered_alone
            prompt = self._generation_prompt if is_assistant else ""
            parts += [(prompt, False), (render(message["role"], content), is_assistant)]
        rest = "".join(text for text, _ in parts)
        before = whole[: len(whole) - len(rest)]
        # Many templates cannot render a conversation without messages.
        if before + rest != whole or (first and before != self.render(messages[:first])):
            raise TemplateError("a message is not rendered alike everywhere in a conversation")
        for text, is_target in [(before, False), *parts]:
            yield from text_pieces(text, is_target)

    def _rendered_alone(self, role: str, content: str) -> str:
        """Render a message of a conversation without its generation prompt."""
        before = (*_PROBE, _PROBE[0]) if role == "assistant" else _PROBE
        begun = self.render(before, add_generation_prompt=role == "assistant")
        return self._after(begun, self.render((*before, {"role": role, "content": content})))

    @staticmethod
    def _after(before: str, whole: str) -> str:
        if not whole.startswith(before):
            raise TemplateError("a message changes what the template renders for those before it")
        return whole[len(before) :]


def check_messages(messages: Any) -> list[Message]:
    """Raise `TemplateError` for what is not a list of messages with role and text."""
    if not isinstance(messages, list) or not messages:
        raise TemplateError("messages are no list of at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TemplateError(f"message {number} is of type {type(message).__name__}")
        if message.get("role") not in ROLES:
            raise TemplateError(
                f"message {number} has the role {message.get('role')!r}; known are "
                f"{', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise TemplateError(f"message {number} has no text as its content")
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def _raise_exception(reason: str) -> NoReturn:
    raise TemplateError(reason)
