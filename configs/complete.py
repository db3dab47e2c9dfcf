"""Completion at a cursor, from the text before and after it: a model of one's own code.

    python scripts/train.py --config configs/complete.py --workdir runs/complete \\
        --config.data.source=FOLDER

Of a git repository, the tracked files are read; without a source, it is Python's own standard
library. The size of ``configs/base.py``, with sequences that hold a segment
of text and what is around it (docs/data.md, "Filling in the middle"), and tokens of two or three
characters: bytes were worse by 0.09 bits/byte after half an hour.
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.data.fim_rate = 0.7
    config.data.tokenizer = "bpe:1024"
    config.data.batch_size = 4
    config.data.sequence_length = 512
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.6e-2
    config.optimizer.warmup_steps = 100
    config.train.steps = 5600
    config.train.eval_every = 1400
    config.train.save_every = 1400
    config.train.sample_every = 2800
    config.train.sample_prompt = "def main("
    return config
