"""Characters of one text file, first 90 % for training: the CPU settings of nanoGPT's README.

    python scripts/train.py --config configs/shakespeare.py --workdir runs/shakespeare \
        --config.data.source=tinyshakespeare.txt

2,000 steps of 12 sequences of 64 characters: 1,536,000 training characters.
Seeds 0, 1 and 2 on tinyshakespeare: 1.590, 1.571 and 1.567 nats/char on the last 10 %, each in
less than a minute of training on 2 CPU cores.
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.model.vocab_size = 68  # the 65 characters of that text, BOS, EOS and PAD
    config.data.source = "tinyshakespeare.txt"
    config.data.tokenizer = "char"
    config.data.split = "position"
    config.data.validation_fraction = 0.1
    config.data.batch_size = 12
    config.data.sequence_length = 64
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 100
    config.train.steps = 2000
    config.train.sample_prompt = "ROMEO:"
    return config
