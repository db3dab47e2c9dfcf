"""Mutated flags and files, given to the scripts in processes of their own."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
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
_CHILDREN_END_WITHIN = 5.0
_SERVER = "serve"
"""The script that does not end by itself."""
_FILES, _VALUES = 0.25, 0.7
"""Fraction of the changes that are of a file, and of those of a flag that keep its name."""
_VALID_WITHIN = 300.0
"""Seconds for a valid command: it compiles what the others then load."""
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
_TOKENIZER = {
    "config": "tiny.py",
    "config.data.source": "corpus.txt",
    "config.data.tokenizer": "bpe:290",
    "output": "out.json",
}


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
    Command("train_tokenizer", _TOKENIZER, ("corpus.txt",)),
    Command("make_conversations", {"conversations": "3", "turns": "2", "seed": "1"}, (),
            ("made.jsonl",)),
    Command("build_tfds", {"source": "texts.jsonl", "name": "mine", "field": "text",
                           "data_dir": "datasets", "max_malformed_records": "1"}, ("texts.jsonl",)),
)  # fmt: skip


def fuzz_scripts(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Mutate a flag, a positional argument or a file of valid commands, and run them.

    First, as many of the valid ones run, or every case might be refused for the same reason.
    """
    inputs = folder / "inputs"
    _make_inputs(inputs)
    for command in COMMANDS[:count]:
        seconds = _STOPPED_AFTER if command.script == _SERVER else _VALID_WITHIN
        shutil.copytree(inputs, folder / "valid")
        problem, kind = _end(_words(command), folder / "valid", seconds)
        shutil.rmtree(folder / "valid")
        if kind != "accepted":
            yield Case(f"{command.script}, valid", problem or kind)

    def run_case(number: int) -> Case:
        draw = random.Random(f"{seed} {number}")
        command = draw.choice(COMMANDS)
        workdir = folder / str(number)
        shutil.copytree(inputs, workdir)
        words, changed, is_long = _change(command, workdir, draw)
        problem, kind = _end(words, workdir)
        shutil.rmtree(workdir)
        if kind == "stopped" and not is_long:
            problem = f"has not ended within {_STOPPED_AFTER:.0f} s"
        return Case(f"command {number}, {command.script}, changed {changed}", problem, kind)

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
        Command("train_tokenizer", _TOKENIZER | {"output": "tokenizer.json"}),
        Command("train", _CONFIG | _CHAT | {"workdir": "run"}),
        Command("sample", {"workdir": "run", "prompt": "a", "max_new_tokens": "0",
                           "save_state": "state.safetensors"}),
        Command("export", {"workdir": "run", "format": "safetensors", "out": "weights"}),
    )  # fmt: skip
    for command in prepared:
        problem, kind = _end(_words(command), inputs, _VALID_WITHIN)
        if kind != "accepted":
            raise RuntimeError(f"{command.script} is {kind}: {problem}")


def _change(command: Command, folder: Path, draw: random.Random) -> tuple[list[bytes], str, bool]:
    """Mutate a word of a command, or a file of `folder` that it reads.

    Returns:
      The words, what was changed, and whether the command may now take any time.
    """
    words = _words(command)
    if command.files and draw.random() < _FILES:
        path = folder / draw.choice(command.files)
        path.write_bytes(_changed(path.read_bytes(), draw))
        return words, str(path.relative_to(folder)), path.suffix == ".py"
    place = draw.randrange(2, len(words))
    name, equals, value = words[place].partition(b"=")
    is_number = re.fullmatch(rb"[\d.]+", value) is not None
    if equals and draw.random() < _VALUES:
        words[place] = name + equals + _inside(_changed(value, draw))
    else:
        words[place] = _inside(_changed(words[place], draw))
    return words, repr(words[place][:_SHOWN]), is_number or command.script == _SERVER


def _changed(content: bytes, draw: random.Random) -> bytes:
    """Mutate until something has changed."""
    new = content
    while new == content:
        new = mutated(content, draw)
    return new


def _inside(word: bytes) -> bytes:
    """Replace what would make it the path of a file elsewhere, or no word."""
    for part in (b"/", b"..", b"~", b"\0"):
        word = word.replace(part, b"_")
    return word


def _words(command: Command) -> list[bytes]:
    """Words of the command, Python and script first."""
    words = [sys.executable, f"{ROOT}/scripts/{command.script}.py", *command.words]
    words += [f"--{name}={value}" for name, value in command.flags.items()]
    return [os.fsencode(word) for word in words]


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
        "TMPDIR": str(folder),
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
        has_children = _end_group(process)
    if has_children:
        return "leaves processes behind", "failed"
    return _outcome(process.returncode, kinds, errors.decode("utf-8", "replace"))


def _end_group(process: subprocess.Popen[bytes]) -> bool:
    """Kill what is left of a process and its children; return whether children outlived it."""
    until = time.monotonic() + _CHILDREN_END_WITHIN
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return False
        if process.poll() is None or time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.01)


def _outcome(code: int, kinds: dict[int, str], errors: str) -> tuple[str | None, str]:
    """Return what is wrong with an exit code and the errors that came with it, and their kind."""
    lines = errors.splitlines()
    num_errors = sum(line.startswith("error: ") for line in lines)
    is_last = not num_errors or lines[-1].startswith("error: ")
    if code not in kinds or "Traceback" in errors or num_errors != (code == 2) or not is_last:
        return f"code {code} with {num_errors} errors: {errors[-2 * _SHOWN :]}", "failed"
    return None, kinds[code]
