"""Mutated flags and files, given to the scripts in processes of their own."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from simplernn_jax.project import ROOT

from .experiment import Case
from .mutation import mutated
from .runs import PARALLEL, write_text

_STOPPED_AFTER = 30.0
"""Seconds after which a script gets SIGTERM: it may have been asked for a billion steps."""
_ENDS_WITHIN = 120.0
"""Seconds in which it must then end: XLA cannot be interrupted."""
_PREPARED_WITHIN = 300.0
"""Seconds for a command that compiles, or that prepares files for the others."""
_EXIT_CODES = {0: "accepted", 2: "refused"}
_EXIT_CODES_OF_SIGTERM = {75: "stopped", 143: "stopped"}
_SHOWN = 500

_CONFIG = {
    "config": "tiny.py",
    "config.model.num_layers": "1",
    "config.data.source": "corpus.txt",
    "config.data.sequence_length": "32",
    "config.train.steps": "3",
    "config.train.save_every": "2",
    "config.train.eval_every": "0",
    "workdir": "new",
}
_CHAT = {"config.data.source": "talk.jsonl", "config.data.template": "roles"}
_BPE = {"config.data.source": "texts.jsonl", "config.data.tokenizer": "bpe:300"}


class Command(NamedTuple):
    """A valid command."""

    script: str
    flags: dict[str, str]
    files: tuple[str, ...] = ()
    """Files that it reads, which may be mutated."""
    words: tuple[str, ...] = ()
    """Positional arguments."""


COMMANDS = (
    Command("train", _CONFIG, ("corpus.txt", "tiny.py")),
    Command("train", _CONFIG | _CHAT | {"config.data.mode": "document"}, ("talk.jsonl",)),
    Command("train", _CONFIG | _BPE | {"config.optimizer.name": "muon"}, ("texts.jsonl",)),
    Command("train", _CONFIG | {"config.data.tokenizer": "tokenizer.json"}, ("tokenizer.json",)),
    Command("train", _CONFIG | {"config.train.init_from": "weights"}),
    Command(
        "sample",
        {"workdir": "run", "prompt": "abc é", "max_new_tokens": "9", "temperature": "0.5",
         "top_k": "7", "top_p": "0.9", "seed": "3", "checkpoint": "newest"},
    ),
    Command(
        "sample",
        {"workdir": "run", "prompt_file": "prompt.txt", "load_state": "state.safetensors",
         "max_new_tokens": "5", "num_samples": "2", "save_state": "next"},
        ("prompt.txt", "state.safetensors"),
    ),
    Command("sample", {"workdir": "weights", "prompt": "a", "quantize": "int8"},
            ("weights/simplernn.json", "weights/model.safetensors")),
    Command("evaluate", {"workdir": "run", "window": "16", "stride": "8", "split": "validation"}),
    Command("explain", {"workdir": "run", "text_file": "prompt.txt", "out": "page",
                        "map_tokens": "8"}, ("prompt.txt",)),
    Command("chat", {"workdir": "run", "system": "be brief", "max_new_tokens": "5"}),
    Command("export", {"workdir": "run", "format": "safetensors", "out": "exported"}),
    Command("compare", {"out": "compared"}, ("run/metrics.jsonl", "run/config.json"),
            ("run", "run")),
    Command("serve", {"workdir": "run", "port": "0", "slots": "2", "cache_mb": "1",
                      "drain_timeout": "1"}),
    Command("train_tokenizer", {"config": "tiny.py", "config.data.source": "corpus.txt",
                                "config.data.tokenizer": "bpe:270", "output": "out.json"},
            ("corpus.txt",)),
    Command("make_conversations", {"conversations": "3", "turns": "2", "seed": "1"}, (),
            ("made.jsonl",)),
    Command("build_tfds", {"source": "texts.jsonl", "name": "mine", "field": "text",
                           "data_dir": "datasets", "max_bad_records": "1"}, ("texts.jsonl",)),
)  # fmt: skip


def fuzz_scripts(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Mutate a flag, a positional argument or a file of valid commands, and run them.

    First, as many of the valid ones run, or every case might be refused for the same reason.
    """
    inputs = folder / "inputs"
    _make_inputs(inputs)
    for command in COMMANDS[:count]:
        problem, kind = _run(command, inputs, folder / "valid", random.Random(0), None)
        if problem is None and kind != "accepted":
            problem = f"the valid command is {kind}"
        if problem is not None:
            yield Case(f"{command.script}, valid", problem)

    def run_case(number: int) -> Case:
        draw = random.Random(f"{seed} {number}")
        command = draw.choice(COMMANDS)
        what = draw.choice(["a flag", "a flag", "a file", "a word"])
        problem, kind = _run(command, inputs, folder / str(number), draw, what)
        return Case(f"command {number}, {command.script}", problem, kind)

    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(run_case, range(count))


def _make_inputs(inputs: Path) -> None:
    """Write all files that the commands read."""
    inputs.mkdir()
    shutil.copy(ROOT / "configs" / "tiny.py", inputs)
    write_text(inputs / "corpus.txt", 3001)
    (inputs / "prompt.txt").write_text("a bc é\n" * 3, encoding="utf-8")
    lines = [{"text": f"some text {i} é"} for i in range(99)]
    (inputs / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    talks = [
        {"messages": [{"role": "user", "content": f"say {i}"},
                      {"role": "assistant", "content": f"{i}!"}]}
        for i in range(99)
    ]  # fmt: skip
    (inputs / "talk.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    prepared = (
        Command("train_tokenizer", _CONFIG_OF_TOKENIZER),
        Command("train", _CONFIG | _CHAT | {"workdir": "run"}),
        Command("sample", {"workdir": "run", "prompt": "a", "max_new_tokens": "0",
                           "save_state": "state.safetensors"}),
        Command("export", {"workdir": "run", "format": "safetensors", "out": "weights"}),
    )  # fmt: skip
    for command in prepared:
        problem, kind = _end(_words(command), inputs, _PREPARED_WITHIN)
        if kind != "accepted":
            raise RuntimeError(f"{command.script} is {kind}: {problem}")


_CONFIG_OF_TOKENIZER = {
    "config": "tiny.py",
    "config.data.source": "corpus.txt",
    "config.data.tokenizer": "bpe:290",
    "output": "tokenizer.json",
}


def _run(
    command: Command, inputs: Path, folder: Path, draw: random.Random, what: str | None
) -> tuple[str | None, str]:
    """Run a mutated command in a copy of `inputs`; return what is wrong, and the outcome."""
    shutil.copytree(inputs, folder)
    words = _words(command)
    shown = "nothing"
    if what == "a file" and command.files:
        path = folder / draw.choice(command.files)
        path.write_bytes(mutated(path.read_bytes(), draw))
        shown = str(path.relative_to(folder))
    elif what is not None:
        place = draw.randrange(2, len(words))
        words[place] = _mutated_word(words[place], draw, is_whole=what == "a word")
        shown = repr(words[place][:_SHOWN])
    try:
        problem, kind = _end(words, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return problem and f"changed {shown}: {problem}", kind


def _words(command: Command) -> list[bytes]:
    """Words of the command, Python and script first."""
    words = [sys.executable, f"{ROOT}/scripts/{command.script}.py", *command.words]
    words += [f"--{name}={value}" for name, value in command.flags.items()]
    return [os.fsencode(word) for word in words]


def _mutated_word(word: bytes, draw: random.Random, *, is_whole: bool) -> bytes:
    """Mutate a word, or only the value of a flag; it names no file elsewhere."""
    name, equals, value = word.partition(b"=")
    if is_whole or not equals:
        name, equals, value = b"", b"", word
    value = mutated(value, draw).replace(b"\0", b"")
    return name + equals + value.replace(b"/", b"_").replace(b"..", b"__")


def _end(
    words: list[bytes], folder: Path, seconds: float = _STOPPED_AFTER
) -> tuple[str | None, str]:
    """Run a command to its end, with SIGTERM after `seconds`; return what is wrong, and the kind
    of its outcome."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TFDS_DATA_DIR": str(folder),
    }
    kinds = _EXIT_CODES
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        errors = process.communicate(b"hello\n", seconds)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        kinds = kinds | _EXIT_CODES_OF_SIGTERM
        try:
            errors = process.communicate(timeout=_ENDS_WITHIN)[1]
        except subprocess.TimeoutExpired:
            return f"does not end within {_ENDS_WITHIN:.0f} s of SIGTERM", "failed"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return _outcome(process.returncode, kinds, errors.decode("utf-8", "replace"))


def _outcome(code: int, kinds: dict[int, str], errors: str) -> tuple[str | None, str]:
    """Return what is wrong with an exit code and the errors that came with it, and their kind."""
    num_errors = sum(line.startswith("error: ") for line in errors.splitlines())
    if code not in kinds or "Traceback" in errors or num_errors != (code == 2):
        return f"code {code} with {num_errors} errors: {errors[-2 * _SHOWN :]}", "failed"
    return None, kinds[code]
