"""25M parameters on a BPE of 8,192 ids, in bfloat16: for an accelerator, or hours on a CPU.

    python scripts/train.py --config configs/small.py --workdir runs/small

The tokenizer is trained on the training split of Python's standard library, 3.0M tokens. After
1,250 steps, 61 minutes on one core of an EPYC (Zen 5), 1.340 bits/byte on held-out files
(``xz -9e``: 1.655). docs/results.md has a sample, and memory and communication on eight devices.
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.model.vocab_size = 8192
    config.model.num_layers = 6
    config.model.hidden_dim = 512
    config.model.key_dim = 512
    config.model.value_dim = 512
    config.model.num_heads = 8
    config.model.mlp_dim = 1792
    config.model.precision = "bfloat16"
    config.data.tokenizer = "bpe:8192"
    config.data.batch_size = 8
    config.data.sequence_length = 512
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.warmup_steps = 100
    config.train.steps = 2000
    config.train.eval_every = 500
    config.train.save_every = 500
    config.train.sample_every = 1000
    return config
