"""An hour on 2 CPU cores: Python's own standard library, by a BPE tokenizer trained on it.

    python scripts/train.py --config configs/hour.py --workdir runs/hour

6,200 steps of 8 sequences of 512 tokens, 25M tokens or 6.8 epochs, with 3.5M parameters: 1.156
bits/byte on held-out files after 42 min on one core of a Xeon with AMX (``configs/base.py``: 1.429;
``xz -9e``: 1.655). A sample at temperature 0.6:

    if not os.path.isfile(path):
        raise ValueError('find/config module {path!r}')
    return file.read(1)
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.model.num_layers = 6
    config.model.hidden_dim = 192
    config.model.key_dim = 192
    config.model.value_dim = 192
    config.model.mlp_dim = 768
    config.model.precision = "bfloat16"
    config.model.dropout = 0.2
    config.data.tokenizer = "bpe:2048"
    config.data.batch_size = 8
    config.data.sequence_length = 512
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.weight_decay = 0.3
    config.optimizer.warmup_steps = 100
    config.train.steps = 6200
    config.train.eval_every = 1550
    config.train.save_every = 1550
    config.train.sample_every = 3100
    return config
