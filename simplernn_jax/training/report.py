"""``report.html``: what a run was trained on, what came out, and what to do next, on one page."""

import base64
import bz2
import lzma
import os
import resource
import shlex
import sys
from collections.abc import Iterator, Mapping

import jax
import zstandard
from flax import nnx

from simplernn_jax.array_types import ModelState
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.data.evaluation_batches import scored_documents
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, counted, format_bytes
from simplernn_jax.files import page_template, read_file, write_file
from simplernn_jax.inference import generate_text
from simplernn_jax.inference.state import model_fingerprint
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.parallel.mesh import is_distributed, local_copy
from simplernn_jax.parallel.named_leaves import in_layout_of
from simplernn_jax.project import name_commands
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import TrainState
from simplernn_jax.training.tuning import start_state

SAMPLES, SAMPLE_TEMPERATURE = 3, 0.8
COMPRESSED_BYTES = 1_000_000
"""Largest part of held-out text and of training text that is compressed, in about 2 s."""

_Gathered = tuple[LanguageModel, ModelState | None] | None
"""Model and learned initial state on one device; None if they are not gathered."""


def write_report(
    run: Run,
    gathered: _Gathered,
    evaluation: Evaluation | None,
    facts: Mapping[str, str],
    curve: str,
    use: str,
) -> str:
    """Write the page of a run that has ended, on the coordinator, and return its path.

    `gathered` is the result of `gather`, `evaluation` the last one on held-out text, `facts` the
    lines of the summary, `curve` the path of the picture of the losses, and `use` the script that
    generates text, with its flags.
    """
    config, corpus, workdir = run.config, run.corpus, f"--workdir {shlex.quote(run.workdir)}"
    memory = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    resident = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {
        "text": f"{config.data.source}: {corpus.summary}",
        "tokenizer": f"{config.data.tokenizer}, {counted(corpus.tokenizer.vocab_size, 'id')}",
        "layers": f"{config.model.num_layers} of width {config.model.hidden_dim}",
        "batch": f"{config.data.batch_size} sequences of {config.data.sequence_length} tokens",
        **facts,
        "memory": f"at most {format_bytes(memory.get('peak_bytes_in_use') or resident)}",
    }
    samples = []
    if gathered is not None:
        facts[f"SHA-256 of the parameters after step {run.step:,}"] = model_fingerprint(gathered[0])
        for seed in range(config.train.seed, config.train.seed + SAMPLES):
            samples.append([_printable(text) for text in sample(run, gathered, seed)])
    commands = [use]
    if evaluation is not None:
        cache = shlex.quote(config.data.cache_dir)
        commands.append(f"evaluate.py {workdir}" + f" --cache_dir {cache}" * (cache != "''"))
    if config.train.tune != "state":  # else they take the model without the learned state
        kind = "html" if config.model.is_convolved else "safetensors"
        out = shlex.quote(os.path.join(run.workdir, kind))
        commands += [f"serve.py {workdir}", f"export.py {workdir} --format {kind} --out {out}"]
    if not run.stopped_early:
        longer = f"steps={2 * run.step}"
        if config.train.epochs:
            longer = f"epochs={2 * config.train.epochs:g}"
        commands.append(f"train.py {workdir} --config.train.{longer}")
    page = page_template("training/report.html").render(
        title=os.path.basename(run.workdir),
        facts=facts,
        curve=base64.b64encode(read_file(curve)).decode(),
        rows=held_out_table(run, evaluation) if evaluation else (),
        samples=samples,
        commands=[name_commands(f"python scripts/{command}") for command in commands],
    )
    path = os.path.join(run.workdir, "report.html")
    write_file(path, page.encode("utf-8", "replace"))
    return path


def gather(run: Run, state: TrainState) -> _Gathered:
    """Gather what `sample` needs, unless it is sharded and the run takes no samples.

    All processes call this. One device may lack the memory.
    """
    if is_distributed(run.mesh) and not run.config.train.sample_every:
        return None
    params, initial = local_copy((state.params, state.tuned.get("initial")))
    graph, abstract = abstract_model(run.config.model)
    return nnx.merge(graph, in_layout_of(abstract, params)), initial


def sample(run: Run, gathered: tuple[LanguageModel, ModelState | None], seed: int) -> list[str]:
    """Return the prompt of a run, a message if it trains on chats, and its continuation.

    If the tokenizer cannot encode the prompt, the continuation says so.
    """
    (model, initial), train, tokenizer = gathered, run.config.train, run.corpus.tokenizer
    prompt = train.sample_prompt
    try:
        if run.config.data.template:
            chat = [{"role": "user", "content": prompt}]
            prompt = ChatTemplate(run.config.data.template).render_next(chat)
        (text,) = generate_text(
            model,
            tokenizer,
            prompt,
            state=None if initial is None else start_state(model, tokenizer, initial),
            max_new_tokens=train.sample_tokens,
            temperature=SAMPLE_TEMPERATURE,
            seed=seed,
        )
    except (UserError, TemplateError) as error:
        text = f" ({error})"
    return [prompt, text]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def text_pieces(split: TokenSplit, tokenizer: Tokenizer, limit_tokens: int = 0) -> Iterator[bytes]:
    """Yield the text that is scored of a split in pieces of at most 2**20 tokens."""
    for start, count in zip(*scored_documents(split, limit_tokens), strict=True):
        for piece in range(start, end := start + count + 1, 2**20):
            yield tokenizer.decode_bytes(split.tokens[piece : min(piece + 2**20, end)])


def held_out_table(run: Run, evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Compare a model with compressors, of which zstd can refer to the end of the training text.

    They compress the text that the model is scored on, and are left out if it is scored on a part
    of the tokens, such as the answers of chats.
    """
    corpus, tokenizer = run.corpus, run.corpus.tokenizer
    held_out, train = corpus.validation, corpus.train
    assert held_out is not None
    part = f"{evaluation.predictions / max(held_out.num_predictions, 1):.0%}"
    scored = f"{part} of {held_out.num_bytes:,}"
    rows: list[tuple[str, ...]] = [
        ("", "bits per byte", "bytes of held-out text", "bytes of training text"),
        (f"this model after step {run.step:,}", f"{evaluation.bits_per_byte:.4f}", scored, "all"),
    ]
    if held_out.targets is not None:
        return rows
    text = bytearray()
    limit = evaluation.predictions if evaluation.predictions < held_out.num_predictions else 0
    for piece in text_pieces(held_out, tokenizer, limit):
        text += piece[: COMPRESSED_BYTES - len(text)]
        if len(text) == COMPRESSED_BYTES:
            break
    count = max(COMPRESSED_BYTES * len(train.tokens) // max(train.num_bytes, 1), 1)
    seen = tokenizer.decode_bytes(train.tokens[-count:])[-COMPRESSED_BYTES:]
    level = zstandard.ZstdCompressionParameters.from_level(19, window_log=23)
    dictionary = zstandard.ZstdCompressionDict(seen, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    after = zstandard.ZstdCompressor(compression_params=level, dict_data=dictionary)
    for name, num_seen, compressed in (
        ("bzip2", 0, bz2.compress(text)),
        ("xz -9e", 0, lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        ("zstd -19", 0, zstandard.ZstdCompressor(level=19).compress(text)),
        ("zstd -19", len(seen), after.compress(text)),
    ):
        bits = 8 * len(compressed) / max(len(text), 1)
        rows.append((name, f"{bits:.4f}", f"{len(text):,}", f"{num_seen:,}"))
    return rows
