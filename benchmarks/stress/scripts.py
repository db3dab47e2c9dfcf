"""Mutated flags and files, given to the scripts in processes of their own."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplernn_jax.project import ROOT

from .experiment import Case, experiment, run_cases
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
_EXIT_CODES = {0: "accepted", 2: "rejected"}
_EXIT_CODES_OF_SIGTERM = {75: "stopped", 143: "stopped"}
_SHOWN = 500

_ALIASES = {
    "TRAIN": "train --config=tiny.py --config.model.num_layers=1 --config.data.sequence_length=32 "
    "--config.train.steps=3 --config.train.save_every=2 --config.train.eval_every=0 --config.data",
    "TOKENIZER": "train_tokenizer --config=tiny.py --config.data.source=corpus.txt "
    "--config.data.tokenizer=bpe:290",
}


def _commands(text: str) -> dict[str, tuple[str, ...]]:
    """Commands, one a line, with the files that they read, which follow a bar."""
    for alias, words in _ALIASES.items():
        text = text.replace(alias, words)
    pairs = (line.partition(" | ") for line in text.strip().splitlines())
    return {command: tuple(files.split()) for command, _, files in pairs}


PREPARATIONS = _commands("""
TOKENIZER --output=tokenizer.json
TRAIN.source=talk.jsonl --config.data.template=roles --workdir=run
sample --workdir=run --prompt=a --max_new_tokens=0 --save_state=state.safetensors
export --workdir=run --format=safetensors --out=weights
""")
"""Commands that write what others read."""
COMMANDS = _commands("""
TRAIN.source=corpus.txt --workdir=new | corpus.txt tiny.py
TRAIN.source=talk.jsonl --config.data.template=roles --config.data.mode=document --workdir=new \
    | talk.jsonl
TRAIN.source=texts.jsonl --config.data.tokenizer=bpe:300 --config.optimizer.name=muon \
    --workdir=new | texts.jsonl
TRAIN.source=corpus.txt --config.data.tokenizer=tokenizer.json --workdir=new | tokenizer.json
TRAIN.source=corpus.txt --config.train.init_from=weights --workdir=new
sample --workdir=run --prompt='abc é' --max_new_tokens=9 --temperature=0.5 --top_k=7 --top_p=0.9 \
    --seed=3 --checkpoint=newest
sample --workdir=run --prompt_file=prompt.txt --load_state=state.safetensors --max_new_tokens=5 \
    --num_samples=2 --save_state=next | prompt.txt state.safetensors
sample --workdir=weights --prompt=a --quantize=int8 | weights/simplernn.json \
    weights/model.safetensors
evaluate --workdir=run --window=16 --stride=8 --split=validation
explain --workdir=run --text_file=prompt.txt --out=page --map_tokens=8 | prompt.txt
chat --workdir=run --system='be brief' --max_new_tokens=5
export --workdir=run --format=safetensors --out=exported
compare run run --out=compared | run/metrics.jsonl run/config.json
serve --workdir=run --port=0 --slots=2 --cache_mb=1 --drain_timeout=1
TOKENIZER --output=out.json | corpus.txt
make_conversations made.jsonl --conversations=3 --turns=2 --seed=1
build_tfds --source=texts.jsonl --name=mine --field=text --data_dir=datasets \
    --max_malformed_records=1 | texts.jsonl
""")
"""Valid commands; their files may be mutated."""


@experiment(full=2000, quick=2, package="uvicorn")
def scripts(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Any flag, argument or file of a script is accepted or rejected in one line.

    One of them is mutated in a valid command. First, as many of the valid ones run, or every case
    might be rejected for the same reason.
    """
    inputs = folder / "inputs"
    _make_inputs(inputs)
    for command in list(COMMANDS)[:count]:
        seconds = _STOPPED_AFTER if command.startswith(_SERVER) else _VALID_WITHIN
        shutil.copytree(inputs, folder / "valid")
        problem, kind = _end(_words(command), folder / "valid", seconds)
        shutil.rmtree(folder / "valid")
        if kind != "accepted":
            yield Case(f"{command}, valid", problem or kind)

    def run_case(number: int, draw: random.Random) -> Case:
        command = draw.choice(list(COMMANDS))
        workdir = folder / str(number)
        shutil.copytree(inputs, workdir)
        words, changed, is_long = _change(command, workdir, draw)
        problem, kind = _end(words, workdir)
        shutil.rmtree(workdir)
        if kind == "stopped" and not is_long:
            problem = f"has not ended within {_STOPPED_AFTER:.0f} s"
        what = f"command {number}, {command.split()[0]}, changed {changed}"
        return Case(what, problem, kind)

    yield from run_cases(run_case, count, seed, PARALLEL)


def _make_inputs(inputs: Path) -> None:
    """Write all files that the commands read."""
    inputs.mkdir()
    shutil.copy(ROOT / "configs" / "tiny.py", inputs)
    write_text(inputs / "corpus.txt", 3001)
    (inputs / "prompt.txt").write_text("a bc é\n" * 3, encoding="utf-8")
    talk = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "{}!"}]
    for name, line in (("texts", {"text": "some text {} é"}), ("talk", {"messages": talk})):
        lines = (json.dumps(line).replace("{}", str(number)) + "\n" for number in range(99))
        (inputs / f"{name}.jsonl").write_text("".join(lines))
    for command in PREPARATIONS:
        problem, kind = _end(_words(command), inputs, _VALID_WITHIN)
        if kind != "accepted":
            raise RuntimeError(f"{command} is {kind}: {problem}")


def _change(command: str, folder: Path, draw: random.Random) -> tuple[list[bytes], str, bool]:
    """Mutate a word of a command, or a file of `folder` that it reads.

    Returns:
      The words, what was changed, and whether the command may now take any time.
    """
    words, files = _words(command), COMMANDS[command]
    if files and draw.random() < _FILES:
        path = folder / draw.choice(files)
        path.write_bytes(mutated(path.read_bytes(), draw))
        return words, str(path.relative_to(folder)), path.suffix == ".py"
    place = draw.randrange(2, len(words))
    name, equals, value = words[place].partition(b"=")
    is_number = re.fullmatch(rb"[\d.]+", value) is not None
    kept = name + equals if equals and draw.random() < _VALUES else b""
    # No path of a file elsewhere, and nothing that is not a word.
    words[place] = kept + re.sub(rb"\.\.|[/~\0]", b"_", mutated(words[place][len(kept) :], draw))
    return words, repr(words[place][:_SHOWN]), is_number or command.startswith(_SERVER)


def _words(command: str) -> list[bytes]:
    """Words of the command, Python and script first."""
    script, *words = shlex.split(command)
    return list(map(os.fsencode, (sys.executable, f"{ROOT}/scripts/{script}.py", *words)))


def _end(
    words: list[bytes], folder: Path, seconds: float = _STOPPED_AFTER
) -> tuple[str | None, str]:
    """Run a command to its end, with SIGTERM after `seconds`; return what is wrong, and the kind
    of its outcome."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **dict.fromkeys(("TFDS_DATA_DIR", "TMPDIR"), str(folder)),
    }
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True, **pipes)
    kinds = _EXIT_CODES
    try:
        try:
            content = process.communicate(b"hello\n", seconds)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            kinds = kinds | _EXIT_CODES_OF_SIGTERM
            content = process.communicate(timeout=_ENDS_WITHIN)[1]
        until = time.monotonic() + _CHILDREN_END_WITHIN
        while has_children := _has_group(process.pid):
            if time.monotonic() > until:
                break
            time.sleep(0.01)
    except subprocess.TimeoutExpired:
        return f"does not end within {_ENDS_WITHIN:.0f} s of SIGTERM", "failed"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if has_children:
        return "leaves processes behind", "failed"
    errors = content.decode("utf-8", "replace")
    lines, code = errors.splitlines(), process.returncode
    num_errors = sum(line.startswith("error: ") for line in lines)
    is_last = not num_errors or lines[-1].startswith("error: ")
    if code not in kinds or "Traceback" in errors or num_errors != (code == 2) or not is_last:
        return f"code {code} with {num_errors} errors: {errors[-2 * _SHOWN :]}", "failed"
    return None, kinds[code]


def _has_group(pid: int) -> bool:
    """Return whether there are processes of the group of a process that has ended."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True
