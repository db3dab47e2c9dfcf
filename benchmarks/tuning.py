"""Fine-tuning of a trained model on other text, and many learned states in one server.

Held-out bits per byte after a number of seconds of train steps, by what is tuned, beside the model
as it is and with the end of the training text as its prompt. The held-out end of the text is scored
in contexts of `CONTEXT` tokens, which begin with the state, if there is one, or from zero. The best
of ten evaluations counts, since a run keeps its best checkpoint; the seconds are of train steps.
"""

import dataclasses
import http.client
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simplernn_jax import load_model
from simplernn_jax.config import Config
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.inference import generate, load_state, save_state
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.minutes import measure
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import make_train_step
from simplernn_jax.training.tuning import save_tuned

from . import serving
from .tables import Row, Table
from .train_steps import change

SECONDS = (15.0, 60.0, 240.0)
KINDS = ("state", "lora:2", "lora:8", "full")
CONTEXT, PROMPT, EVAL_TOKENS, PERSONAS = 256, 16384, 65536, 100
SOURCES = {
    "author": sysconfig.get_path("purelib") + "/*.dist-info/METADATA",
    "language": sysconfig.get_path("include") + "/*.h",
}
"""Texts that every Python has: descriptions of packages, and C."""


def run(base: str, author: str | None, seconds: Iterable[float]) -> Iterator[Table]:
    """Table by text, and one of the personas; `base` is a workdir, `author` another text."""
    limits = [*seconds] if [*seconds] != [0] else SECONDS
    with tempfile.TemporaryDirectory() as folder:
        for name, source in (SOURCES | ({"author": author} if author else {})).items():
            rows: list[Row] = []
            for kind in KINDS:
                row: Row = {"tuned": kind}
                for limit in limits:
                    workdir = f"{folder}/{name}-{kind}-{limit}"
                    before, after = tune(base, source, kind, limit, workdir, not rows)
                    rows += before
                    row |= after
                rows.append(row)
            yield Table(f"tune: held-out bits/byte of another {name}, {source}", rows)
        state = f"{folder}/language-state-{limits[0]}/state.safetensors"
        yield Table("tune: learned states in one server", [serve_personas(base, state)])


def tune(
    base: str, source: str, kind: str, seconds: float, workdir: str, with_before: bool
) -> tuple[list[Row], Row]:
    """Tune `base` for some seconds of steps.

    Returns:
      Rows of what it was before, none unless `with_before`, and columns of the result.
    """
    fields: Row = {"name": "muon", "learning_rate": 5e-3} if kind == "full" else {}
    fields |= {"source": source, "split": "position", "batch_size": 8, "sequence_length": CONTEXT}
    fields |= {"init_from": base, "tune": kind, "minutes": seconds / 60, "warmup_steps": 20}
    config = change(Config(), **fields)
    config.mesh.data = 1
    with Run(config, workdir) as run:
        tokenizer, held_out = run.corpus.tokenizer, run.corpus.validation
        step = make_train_step(run.config, run.optimizer, run.mesh, with_steps=True)
        evaluator = Evaluator(run.config, tokenizer.pad_id, run.mesh)

        def bits(initial: Any) -> float:
            options: Row = {"contexts": Contexts(CONTEXT, CONTEXT), "initial": initial}
            assert held_out is not None
            return evaluator(run.state.params, held_out, EVAL_TOKENS, **options).bits_per_byte

        before: Row = {}
        if with_before:
            prompt = np.asarray(run.corpus.train.tokens[-PROMPT:], np.int32)
            read = generate(load_model(base)[0], [prompt], max_new_tokens=0).state
            before = {"nothing": bits(None), "text as prompt": bits(read.layers)}
        run.total_steps = max(1, round(seconds / measure(run, step, evaluator).step))
        result = float("inf")
        while (batch := run.next_batch()) is not None:
            run.state, metrics = step(run.state, batch, run.schedule)
            jax.block_until_ready(metrics)
            run.step += 1
            if run.step % max(1, run.total_steps // 10) == 0 or run.step == run.total_steps:
                result = min(result, bits(run.state.tuned.get("initial")))
        run.save(wait=True)
    after: Row = {f"{seconds:g} s": result, f"steps in {seconds:g} s": run.total_steps}
    if kind != "full":
        after["bytes"] = Path(save_tuned(workdir, tokenizer)).stat().st_size
    return [{"tuned": name, "bits/byte": value} for name, value in before.items()], after


def serve_personas(base: str, path: str) -> Row:
    """Memory of a server, and milliseconds to a first token, with variations of a state by name."""
    model, tokenizer, _ = load_model(base)
    state = load_state(path, model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(PERSONAS):
            layers = jax.tree.map(lambda x, factor=1 - number / 1000: x * factor, state.layers)
            varied = dataclasses.replace(state, layers=layers)
            save_state(f"{folder}/p{number}.safetensors", varied, model, tokenizer)
        with serving.serving(base, f"--state_dir={folder}") as (process, url):
            connection = http.client.HTTPConnection(url.removeprefix("http://"))

            def first_token(number: int, state: str | None) -> float:
                body = json.dumps({"prompt": f"{number}:", "max_tokens": 1, "state": state})
                start = time.perf_counter()
                connection.request("POST", "/v1/completions", body)
                response = connection.getresponse()
                if response.read() and response.status != 200:
                    raise ConnectionError(f"a completion from {state} has status {response.status}")
                return 1e3 * (time.perf_counter() - start)

            def megabytes() -> float:
                status = Path(f"/proc/{process.pid}/status").read_text()
                return int(status.split("VmRSS:")[1].split()[0]) / 1e3

            for number in range(10):  # warm up
                first_token(number, None)
            row: Row = {"states": PERSONAS, "memory before, MB": megabytes()}
            for kind in ("no state", "first", "next"):
                times = [
                    first_token(number, None if kind == "no state" else f"p{number}")
                    for number in range(PERSONAS)
                ]
                row |= serving.percentiles(f"first token, ms, {kind} request", times)
            return row | {"memory after, MB": megabytes()}
