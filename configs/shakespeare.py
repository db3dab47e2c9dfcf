"""Characters of one text file, first 90 % for training: the CPU budget of nanoGPT's README.

    python scripts/train.py --config configs/shakespeare.py --workdir runs/shakespeare \
        --config.data.source=tinyshakespeare.txt

2,000 steps of 6 sequences of 128 characters: 1,536,000 training characters.
Seeds 0, 1 and 2 on tinyshakespeare: 1.491, 1.475 and 1.481 nats/char on the last 10 %, after 28 to
29 s of training steps on 2 CPU cores (Xeon with AMX); see docs/results.md.
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.model.vocab_size = 68  # the 65 characters of that text, BOS, EOS and PAD
    config.model.precision = "bfloat16"
    config.data.source = "tinyshakespeare.txt"
    config.data.tokenizer = "char"
    config.data.split = "position"
    config.data.validation_fraction = 0.1
    config.data.batch_size = 6
    config.data.sequence_length = 128
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.warmup_steps = 100
    config.train.steps = 2000
    config.train.sample_prompt = "ROMEO:"
    return config
