"""Program that renders chat templates in Jinja's sandbox, under limits of the operating system.

It imports nothing of this project. Each request and each answer is a line of JSON:

    [TEMPLATE, [[MESSAGES, add_generation_prompt], ...]]
    {"texts": [TEXT, ...]} or {"error": REASON}
"""

import functools
import json
import resource
import signal
import sys
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_SECONDS = 1.0
"""CPU time of a rendering; SIGPROF then kills the process."""
_MAX_BYTES = 1 << 29
"""Memory of the process."""
_GLOBALS = ("dict", "namespace", "range")


def main() -> None:
    """Answer requests until the parent process closes its end, or ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MAX_BYTES if hard == resource.RLIM_INFINITY else min(_MAX_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for request in sys.stdin.buffer:
        sys.stdout.buffer.write(_answer(request) + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(request: bytes) -> bytes:
    try:
        source, renderings = json.loads(request)
        texts = []
        for messages, asks in renderings:
            signal.setitimer(signal.ITIMER_PROF, _MAX_SECONDS)
            template = _compiled(source)
            texts.append(template.render(messages=messages, add_generation_prompt=asks))
        return json.dumps({"texts": texts}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except MemoryError:
        reason = "it uses too much memory"
    except jinja2.TemplateError as error:
        reason = str(error)
    except Exception as error:  # a template can fail in any way
        reason = f"{type(error).__name__}: {error}"
    return json.dumps({"error": reason[:1000]}).encode()


@functools.lru_cache(8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # What Hugging Face's transformers has, except the time: text must not depend on it.
    environment.globals = {name: environment.globals[name] for name in _GLOBALS}
    environment.globals |= {"raise_exception": _raise, "bos_token": "", "eos_token": ""}
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(source)


def _raise(reason: str) -> NoReturn:
    raise jinja2.TemplateError(reason)


if __name__ == "__main__":
    main()
