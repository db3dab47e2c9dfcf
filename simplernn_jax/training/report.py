"""``report.html``: what a run was trained on, what came out, and what to do next, on one page."""

import base64
import bz2
import hashlib
import lzma
import os
import resource
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import zstandard
from flax import nnx

from simplernn_jax.data.batches import document_ends
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, counted, format_bytes
from simplernn_jax.files import page_template, read_file, write_file
from simplernn_jax.inference import generate_text
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.parallel.mesh import is_distributed, local_copy
from simplernn_jax.parallel.named_leaves import in_layout_of, named_leaves
from simplernn_jax.project import name_commands
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import TrainState
from simplernn_jax.training.tuning import start_state

SAMPLES, SAMPLE_TEMPERATURE = 3, 0.8
HELD_OUT_BYTES, TRAINING_BYTES = 2_000_000, 4_000_000
"""Bytes of held-out text that are compressed, and the last of the training text that zstd may refer
to: about 4 s. Up to a quarter of these, xz compresses the training text, too."""


def write_report(
    run: Run, gathered: Any, evaluation: Evaluation | None, facts: Mapping[str, str], curve: str
) -> str:
    """Write the page of a run that has ended, on the coordinator, and return its path.

    Args:
      run: the run after its last step.
      gathered: the result of `gather`; None leaves out what needs them.
      evaluation: on held-out text, if there is any.
      facts: the lines of its summary, by name.
      curve: path of the picture of its losses.
    """
    config, corpus, split = run.config, run.corpus, run.corpus.validation
    memory = jax.local_devices()[0].memory_stats() or {}
    peak = memory.get("peak_bytes_in_use") or (
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    page = page_template("simplernn_jax.training", "report.html").render(
        name=os.path.basename(run.workdir),
        facts={
            "text": f"{config.data.source}: {corpus.summary}",
            "tokenizer": f"{config.data.tokenizer}, {counted(corpus.tokenizer.vocab_size, 'id')}",
            "layers": f"{config.model.num_layers} of width {config.model.hidden_dim}",
            "batch": f"{config.data.batch_size} sequences of {config.data.sequence_length} tokens",
            **facts,
            "memory": f"at most {format_bytes(peak)}",
            "SHA-256 of the parameters": gathered and parameters_digest(run, gathered[0]),
        },
        curve=base64.b64encode(read_file(curve)).decode(),
        evaluation=evaluation,
        split=split,
        rows=compress_held_out(run),
        samples=[
            map(_printable, sample(run, gathered, config.train.seed + number, prompt))
            for number, prompt in enumerate(_prompts(run) if gathered else ())
        ],
        commands=_commands(run),
    )
    path = os.path.join(run.workdir, "report.html")
    write_file(path, page.encode("utf-8", "replace"))
    return path


def gather(run: Run, state: TrainState) -> Any:
    """Return parameters and learned state on one device; None if sharded and without samples.

    All processes call it. One device may lack the memory.
    """
    is_allowed = run.config.train.sample_every or not is_distributed(run.mesh)
    learned = {name: leaf for name, leaf in state.tuned.items() if name == "initial"}
    return local_copy((state.params, learned)) if is_allowed else None


def sample(run: Run, gathered: Any, seed: int, prompt: str) -> tuple[str, str]:
    """Return a prompt, as a message if the run trains on chats, and its continuation.

    If the tokenizer cannot encode the prompt, the continuation says so. `gathered` is the result of
    `gather`.
    """
    params, learned = gathered
    template = run.config.data.template
    graph, abstract = abstract_model(run.config.model)
    try:
        if template:
            chat = [{"role": "user", "content": prompt}]
            prompt = ChatTemplate(template).render_next(chat)
        model = nnx.merge(graph, in_layout_of(abstract, params))
        (text,) = generate_text(
            model,
            run.corpus.tokenizer,
            prompt,
            state=start_state(model, run.corpus.tokenizer, learned),
            max_new_tokens=run.config.train.sample_tokens,
            temperature=SAMPLE_TEMPERATURE,
            seed=seed,
        )
    except (UserError, TemplateError) as error:
        text = f" ({error})"
    return prompt, text


def _prompts(run: Run) -> list[str]:
    """Return the run's prompt, or else beginnings of held-out text, far from one another."""
    prompt, split = run.config.train.sample_prompt, run.corpus.validation
    if prompt or split is None or run.config.data.template:
        return [prompt] * SAMPLES
    starts = (number * len(split.tokens) // SAMPLES for number in range(SAMPLES))
    texts = [run.corpus.tokenizer.decode(split.tokens[start : start + 40]) for start in starts]
    return [text.strip("\ufffd") for text in texts]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _commands(run: Run) -> list[str]:
    workdir = shlex.quote(run.workdir)
    scripts = [
        ("chat", "") if run.config.data.template else ("sample", " --prompt TEXT"),
        *(("evaluate", ""), ("serve", ""), ("export", f" --format html --out {workdir}/html")),
        ("train", f" --config.train.steps={2 * run.step}"),
    ]
    return [
        name_commands(f"python scripts/{script}.py --workdir {workdir}{rest}")
        for script, rest in scripts
    ]


def parameters_digest(run: Run, params: Any) -> str:
    """Return the SHA-256 of a line ``NAME DTYPE SHAPE`` and the values of each parameter."""
    digest = hashlib.sha256()
    layers = in_layout_of(abstract_model(run.config.model)[1], params)
    for name, leaf in sorted(named_leaves(layers).items()):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def text_pieces(split: TokenSplit, tokenizer: Tokenizer) -> Iterator[bytes]:
    """Yield the text of a split, document after document, in pieces of at most 2**20 tokens."""
    for start, end in zip(split.document_starts, document_ends(split), strict=True):
        for piece in range(start, end, 2**20):
            yield tokenizer.decode_bytes(split.tokens[piece : min(piece + 2**20, end)])


def compress_held_out(run: Run) -> list[tuple[str, int, int, float]]:
    """Compress held-out text, alone and after training text, once for each run.

    Returns:
      Name of the compressor, bytes of training text it has seen, bytes of held-out text, and bits
      per byte. Nothing if nothing is held out, or only parts of the text are scored.
    """
    split, tokenizer = run.corpus.validation, run.corpus.tokenizer
    if run.compressed or split is None or split.targets is not None:
        return run.compressed
    text = bytearray()
    for piece in text_pieces(split, tokenizer):
        text += piece[: HELD_OUT_BYTES - len(text)]
        if len(text) == HELD_OUT_BYTES:
            break
    train = run.corpus.train
    count = TRAINING_BYTES * len(train.tokens) // max(train.num_bytes, 1)
    seen = tokenizer.decode_bytes(train.tokens[-max(count, 1) :])[-TRAINING_BYTES:]
    dictionary = zstandard.ZstdCompressionDict(seen, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    zstd = zstandard.ZstdCompressionParameters.from_level(19, window_log=23)
    after = zstandard.ZstdCompressor(compression_params=zstd, dict_data=dictionary)
    sizes = {
        ("bzip2", 0): len(bz2.compress(text)),
        ("xz -9e", 0): _xz(text),
        ("zstd -19", 0): len(zstandard.ZstdCompressor(level=19).compress(text)),
        ("zstd -19", len(seen)): len(after.compress(text)),
    }
    if len(seen) <= TRAINING_BYTES // 4:
        sizes["xz -9e", len(seen)] = _xz(seen + text) - _xz(seen)
    scale = 8 / max(len(text), 1)
    run.compressed = [(*key, len(text), scale * size) for key, size in sizes.items()]
    return run.compressed


def _xz(text: bytes | bytearray) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
