"""Score a trained model on held-out text, compared with `xz -9e` on the same bytes.

    python scripts/evaluate.py --workdir runs/base
    python scripts/evaluate.py --workdir runs/base --window 256 --stride 64
    python scripts/evaluate.py --workdir runs/base --source book.txt

Every prediction counts once, with the state carried within each document, or, with --window, in
overlapping contexts from the initial state. --source scores another text than the run's.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import lzma
from functools import partial

import numpy as np
from absl import flags

from simplernn_jax.cli import command_line, process_start
from simplernn_jax.data.batches import document_ends
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, counted, one_line

_MODEL = command_line.ModelFlags()
_CORPUS = command_line.CorpusFlags()
_SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "train"], "Text to score.")
_SOURCE = flags.DEFINE_string(
    "source", None, "Text to score in place of a split, as for --config.data.source."
)
_BOUNDS = {"lower_bound": 0, "upper_bound": 2**31 - 1}
_WINDOW = flags.DEFINE_integer(
    "window",
    0,
    "Context length in tokens for sliding-window scoring, each from the initial state; "
    "0 carries the state across each document.",
    **_BOUNDS,
)
_STRIDE = flags.DEFINE_integer(
    "stride", 0, "Tokens from one context to the next; 0 uses half of --window.", **_BOUNDS
)


def main() -> None:
    """Load a checkpoint of --workdir and print its scores on --split, or on --source."""
    if _STRIDE.value and not _WINDOW.value:
        raise UserError(f"--stride={_STRIDE.value} needs --window: pass it too")
    windows = None
    if _WINDOW.value:
        windows = Contexts(_WINDOW.value, _STRIDE.value or (_WINDOW.value + 1) // 2)
    for flag in (_SPLIT, *_CORPUS.holders):
        if _SOURCE.value is not None and flag.present:
            raise UserError(f"--source and --{flag.name} are mutually exclusive")
    model, tokenizer, config = _MODEL.load()
    from flax import nnx

    from simplernn_jax.inference.loading import is_exported
    from simplernn_jax.models.memory_estimate import check_evaluation
    from simplernn_jax.training.display import align
    from simplernn_jax.training.evaluate import Evaluator
    from simplernn_jax.training.preparation import tokenize_source
    from simplernn_jax.training.tuning import read_tuned

    if _SOURCE.value is None:
        corpus, kind = _CORPUS.open(_MODEL.workdir), "split"
        split = corpus.train if _SPLIT.value == "train" else corpus.validation
    else:
        process_start.raise_on_signals()  # there is a temporary folder
        split, kind = tokenize_source(_SOURCE.value, config, tokenizer), "text"
    if split is None:
        raise UserError(
            f"{_MODEL.workdir} was trained with --config.data.validation_fraction=0 and has no "
            "held-out text; score its training text with --split train"
        )
    state, begin, initial = "carried within each document", "zero", None
    if config.train.tune == "state" and not is_exported(_MODEL.workdir):
        initial = read_tuned(_MODEL.workdir, _MODEL.checkpoint)[2]["initial"]
        state, begin = f"{state}, from the learned one", "learned"
    if windows is not None:
        context = f"{windows.length - windows.stride + 1} to {windows.length} tokens of context"
        state = f"{begin}, then {context} (fewer at a document's start)"
        longest = int(np.max(document_ends(split) - split.document_starts, initial=0))
        check_evaluation(model, min(windows.length, longest))
    evaluator = partial(Evaluator(config, tokenizer.pad_id), initial=initial)
    params = nnx.state(model, nnx.Param)
    result = evaluator(params, split, contexts=windows)
    xz = ""
    if split.targets is None:  # or the model is not scored on the whole text
        xz = f"   (xz -9e: {xz_bits_per_byte(split, tokenizer):.4f})"
    facts = {
        kind: f"{one_line(split.name)}, {counted(len(split.document_starts), 'document')}",
        "size": f"{counted(len(split.tokens), 'token')}; {counted(split.num_bytes, 'byte')} scored",
        "state": state,
        "predictions": f"{result.predictions:,}",
        "nats/token": f"{result.nats_per_token:.4f}",
        "perplexity": f"{result.perplexity:.4f}",
        "bits/byte": f"{result.bits_per_byte:.4f}{xz}",
    }
    for part in split.parts:
        scores = evaluator(params, part, contexts=windows) if part.num_predictions else None
        facts[one_line(part.name)] = str(scores or "no predictions")
    if windows is not None:
        facts["state carried within documents"] = str(evaluator(params, split))
    print(align(facts))


def xz_bits_per_byte(split: TokenSplit, tokenizer: Tokenizer) -> float:
    """Return the bits per byte of `xz -9e` on the concatenated documents of `split`."""
    from simplernn_jax.training.report import text_pieces

    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    num_bytes = num_compressed = 0
    for text in text_pieces(split, tokenizer):
        num_bytes += len(text)
        num_compressed += len(compressor.compress(text))
    num_compressed += len(compressor.flush())
    return 8 * num_compressed / max(num_bytes, 1)


if __name__ == "__main__":
    command_line.run(main)
