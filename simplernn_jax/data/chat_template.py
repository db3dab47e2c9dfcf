"""Conversations as text, by a Jinja template in the form of Hugging Face's ``chat_template``."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simplernn_jax.data.documents import MalformedRecord, Piece, cut_text, pieces_of
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.files import read_file

Message = dict[str, str]
"""``role`` and ``content``, as in OpenAI's API."""

_ROLES = """\
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
"""The template ``roles``: a message is a control character for its role, its content, and U+0004
(end of transmission): one token each in byte-level vocabularies, and absent from text."""

_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
)
_ROLE_OF = {"human": "user", "gpt": "assistant"} | {x: x for x in ("system", "user", "assistant")}
"""Roles by their names, with ShareGPT's."""
_WORKER = str(Path(__file__).with_name("template_worker.py"))
_MAX_ANSWER, _EXPANSION = 1 << 24, 16
"""Bytes of an answer, and further ones for each byte of the request."""


class TemplateError(MalformedRecord):
    """Reason why messages cannot be rendered."""


def load_template(spec: str) -> str:
    """Return the text of a template.

    Args:
      spec: ``roles``, the path of a Jinja file, or the text itself.

    Raises:
      UserError: no such file, or the template cannot be used.
    """
    text = _ROLES if spec == "roles" else spec
    if "{{" not in text:
        try:
            text = read_file(os.path.expanduser(spec)).decode("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"config.data.template={spec}: {reason}; name a Jinja file, or use roles"
            ) from error
    ChatTemplate(text)
    return text


class ChatTemplate:
    """A template that renders messages one after another.

    Variables are the same as in Hugging Face's templates: ``messages``, ``add_generation_prompt``,
    and ``bos_token`` and ``eos_token``, which are empty, since BOS begins and EOS ends every
    document.

    Args:
      source: its text. It runs in another process, in a sandbox with limits on time and memory.

    Raises:
      UserError: it is not a template, or a message changes what was rendered before it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        opening = _PROBE[:1]
        try:
            self._prefix, self._asked, opened, asked = _RENDERER.render(
                source,
                [(_PROBE, False), ((*_PROBE, *opening), True), (opening, False), (opening, True)],
            )
            self._generation_prompt = _after(opened, asked)
            self.end_of_turn = _after(asked + _PROBE[1]["content"], self._prefix)
            """Text that ends an assistant's message."""
            self.stop = self.end_of_turn.strip(" ")
            """The part of it that ends generation."""
        except TemplateError as error:
            raise UserError(f"chat template: {error}; correct config.data.template") from error
        if not self.stop:
            raise UserError(
                "chat template: nothing ends an assistant's message; correct config.data.template"
            )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render messages and, if wanted, the beginning of an answer; raises `TemplateError`."""
        return _RENDERER.render(self.source, [(messages, add_generation_prompt)])[0]

    def render_next(self, messages: Sequence[Message]) -> str:
        """Render messages after a finished conversation, and a generation prompt, as `render`."""
        whole = self.render((*_PROBE, *messages), add_generation_prompt=True)
        return _after(self._prefix, whole)

    def pieces(
        self, conversations: Sequence[Sequence[Message]], *, only_assistant: bool
    ) -> list[list[Piece] | TemplateError]:
        """Return the pieces of each conversation, or its error; faster for several together.

        With `only_assistant`, only what the assistant writes, the end of its turn included, is a
        target.
        """
        try:
            return [*self._pieces(conversations, only_assistant)]
        except TemplateError as error:
            if len(conversations) == 1:
                return [error]
            alone = [self.pieces([x], only_assistant=only_assistant) for x in conversations]
            return [found for (found,) in alone]

    def _pieces(
        self, conversations: Sequence[Sequence[Message]], only_assistant: bool
    ) -> list[list[Piece]]:
        """Render whole conversations, and each message after their first answer on its own."""
        tails = [_from_first_answer(x) if only_assistant else [] for x in conversations]
        requests = [*conversations, *(_after_probe(message) for tail in tails for message in tail)]
        texts = iter(_RENDERER.render(self.source, [(one, False) for one in requests]))
        wholes = [next(texts) for _ in conversations]
        found = []
        for whole, tail in zip(wholes, tails, strict=True):
            parts: list[tuple[str, bool]] = []
            for message in tail:
                is_assistant = message["role"] == "assistant"
                prompt = self._generation_prompt if is_assistant else ""
                before = self._asked if is_assistant else self._prefix
                parts += [(prompt, False), (_after(before, next(texts)), is_assistant)]
            rest = "".join(text for text, _ in parts)
            if not whole.endswith(rest):
                raise TemplateError("a message is not rendered alike everywhere in a conversation")
            parts.insert(0, (whole[: len(whole) - len(rest)], not only_assistant))
            found.append([*pieces_of(one for part in parts for one in cut_text(*part))])
        return found


def _from_first_answer(messages: Sequence[Message]) -> Sequence[Message]:
    roles = [message["role"] for message in messages]
    return messages[roles.index("assistant") :] if "assistant" in roles else []


def _after_probe(message: Message) -> Sequence[Message]:
    """Return a conversation that ends with a message."""
    before = (*_PROBE, _PROBE[0]) if message["role"] == "assistant" else _PROBE
    return *before, message


def _after(before: str, whole: str) -> str:
    if not whole.startswith(before):
        raise TemplateError("a message changes what the template renders for those before it")
    return whole[len(before) :]


class _Renderer:
    """A process that renders templates; started when needed, and again after it was killed.

    Thread-safe. It ends with this process: it then reads the end of its input.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self, source: str, renderings: Sequence[tuple[Sequence[Message], bool]]
    ) -> list[str]:
        """Render messages by the template `source`, with a generation prompt where True is given.

        Raises:
          TemplateError: one of them cannot be rendered, or exceeds a limit.
        """
        text = json.dumps([source, renderings], ensure_ascii=False)
        request = text.encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            answer = self._exchange(request, _MAX_ANSWER + _EXPANSION * len(request))
        found = json.loads(answer)
        if "error" in found:
            raise TemplateError(one_line(found["error"]))
        return found["texts"]

    def _exchange(self, request: bytes, limit: int) -> bytes:
        answer, problem = b"", ""
        try:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._process = _start_worker()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(request)
            self._process.stdin.flush()
            answer = self._process.stdout.readline(limit)
        except OSError as error:
            problem = f"no process renders it ({error})"
        finally:  # after an interrupt, too
            code = None if answer.endswith(b"\n") else self.close()
        if answer.endswith(b"\n"):
            return answer
        if len(answer) == limit:
            problem = "it renders too much text"
        elif code == -signal.SIGPROF:
            problem = "it takes more than 1 s of CPU time"
        raise TemplateError(problem or f"the process that renders it has ended (exit code {code})")

    def close(self) -> int | None:
        """End the process; return its exit code, or None if there is none."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(BrokenPipeError), process:
            process.kill()
        return process.returncode


def _start_worker() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P and -S: neither the folder of the program nor hooks of packages are used.
        [sys.executable, "-P", "-S", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={
            "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path)),
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        },
        start_new_session=True,  # Ctrl-C is for the parent
    )


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)


def messages_of(record: Mapping[str, Any], field: str = "messages") -> list[Message]:
    """Return the messages of a record, which are in `field`, in the form of OpenAI or ShareGPT.

    A record without ``messages`` may have ShareGPT's ``conversations``, or Alpaca's
    ``instruction``, ``input`` and ``output``. A ``system`` text beside them is the first message.

    Raises:
      TemplateError: it lacks the field, or has something else in it.
    """
    system = record.get("system")
    if field == "messages" not in record:
        if {"instruction", "output"} <= record.keys():
            if record.get("history"):
                raise TemplateError("field 'history' is not supported; use 'messages'")
            parts = [record["instruction"], record.get("input") or ""]
            question = "\n".join(map(str, filter(None, parts)))
            pairs = [("user", question), ("assistant", record["output"])]
            record = {field: [{"role": role, "content": content} for role, content in pairs]}
        elif "conversations" in record:
            field = "conversations"
    if field not in record:
        raise TemplateError(
            f"no field {field!r}; it has {', '.join([*record][:8]) or 'none'}: name the one with "
            "the messages by config.data.field"
        )
    messages = record[field]
    if not isinstance(messages, list) or not messages:
        raise TemplateError("messages are not a list of at least one")
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TemplateError(f"message {number} is of type {type(message).__name__}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in _ROLE_OF:
            known = ", ".join(_ROLE_OF)
            raise TemplateError(f"message {number} has the role {role!r}; known are {known}")
        if not isinstance(content, str):
            raise TemplateError(f"message {number} has no text as its content")
        found.append({"role": _ROLE_OF[role], "content": content})
    return found
