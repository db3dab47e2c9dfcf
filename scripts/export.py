"""Export a trained model, so that it runs where this project is not installed.

    python scripts/export.py --workdir runs/base --format html --out shared
    python scripts/export.py --workdir runs/base --format huggingface --out runs/base-hf

--format is one of:

    html         one file that generates text in any browser, offline
    huggingface  a folder for transformers.AutoModelForCausalLM, with a tokenizer and a model card
    safetensors  the parameters and their configuration
    stablehlo    prefill and decoding, serialized by jax.export for CPU, CUDA and TPU, a tokenizer
                 and an example that generates text
    onnx         the same for ONNX Runtime

The export is loaded and compared with the model on held-out text before it is put in place. html
needs the package mini-racer, safetensors nothing more, the others the extra:
pip install 'simplernn_jax[export]'.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

from absl import flags, logging

from simplernn_jax.cli import command_line, process_start
from simplernn_jax.errors import UserError
from simplernn_jax.export import FORMATS, QUANTIZATIONS

_MODEL = command_line.ModelFlags(quantizes=False)
_CORPUS = command_line.CorpusFlags()
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "See above.")
_OUT = flags.DEFINE_string("out", None, "Folder for the files; must not exist.")
_QUANTIZE = flags.DEFINE_enum(
    "quantize",
    "none",
    [*QUANTIZATIONS],
    "Store the weights in fewer bits: float16 (html, onnx) halves the files, int8 (html) quarters "
    "them.",
)
_LICENSE = flags.DEFINE_string(
    "license", "", "License of the weights, for the model card, such as apache-2.0 or cc-by-4.0."
)
_LANGUAGE = flags.DEFINE_list(
    "language", [], "Languages of the text, for the model card: ISO 639 codes, such as en,de."
)
_CHECKED_TOKENS = 250
"""Not a multiple of the 64 tokens of a prefill, so that decoding is checked, too."""


def main() -> None:
    """Export the chosen checkpoint of --workdir to --out."""
    workdir = _MODEL.workdir
    if not _OUT.value:
        raise UserError("no --out: specify a new folder")
    if not _FORMAT.value:
        raise UserError(f"no --format: specify one of {', '.join(FORMATS)}")
    out = command_line.expand_path(_OUT.value, "out")
    import numpy as np

    from simplernn_jax.export.exporting import check_new, export
    from simplernn_jax.inference import generate

    process_start.raise_on_signals()  # which removes the temporary folder
    check_new(out)
    model, tokenizer, config = _MODEL.load()
    try:
        corpus = _CORPUS.open(workdir)
        tokens = np.asarray((corpus.validation or corpus.train).tokens[:_CHECKED_TOKENS])
    except UserError as error:
        logging.warning("no held-out text, checking on generated text: %s", error)
        prompt = [tokenizer.bos_id]
        generated = generate(model, prompt, max_new_tokens=_CHECKED_TOKENS - 1, temperature=1.0)
        tokens = np.concatenate([prompt, generated.tokens[0]])
    report = export(
        _FORMAT.value,
        model,
        tokenizer,
        config,
        out,
        workdir=workdir,
        tokens=tokens,
        quantize=_QUANTIZE.value,
        license=_LICENSE.value,
        languages=_LANGUAGE.value,
    )
    print(f"{_OUT.value}: {report}")


if __name__ == "__main__":
    command_line.run(main)
