"""Train a byte-level BPE on the training split of a configuration, and save it for other runs.

    python scripts/train_tokenizer.py --config configs/base.py --config.data.source=my_texts/ \\
        --config.data.tokenizer=bpe:8192 --output tokenizer.json

scripts/train.py does the same for --config.data.tokenizer=bpe:8192, and keeps the tokenizer in the
checkpoint. The file is a Hugging Face tokenizer.json without special tokens.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import tempfile

from absl import flags

from simplernn_jax.cli import command_line, process_start
from simplernn_jax.cli.config_files import define_config_flag, read_config
from simplernn_jax.files import check_writable, write_file

define_config_flag()
_OUTPUT = flags.DEFINE_string("output", None, "File to write.", required=True)


def main() -> None:
    """Train the tokenizer, write it, and print how to use it."""
    from simplernn_jax.data.token_store import train_tokenizer

    config, output = read_config(), command_line.expand_path(_OUTPUT.value, "output")
    check_writable(output)
    process_start.raise_on_signals()  # there is a temporary folder
    with tempfile.TemporaryDirectory() as folder:
        cache_dir = config.data.cache_dir or folder
        tokenizer = train_tokenizer(config.data, config.train.seed, cache_dir)
    write_file(output, tokenizer.tokenizer_json.encode())
    print(
        f"{output}: {tokenizer.vocab_size:,} ids, specials included; train with "
        f"--config.data.tokenizer={output}"
    )


if __name__ == "__main__":
    command_line.run(main)
