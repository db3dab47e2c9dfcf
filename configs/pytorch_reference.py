"""The run of the original PyTorch project: two plain layers of width 128, JSONL records, Adam.

    python scripts/train.py --config configs/pytorch_reference.py --workdir runs/seed \
        --config.data.source=my_dialogues.jsonl

Records look like ``{"user": "", "bot": "a sentence"}``; the field ``bot`` is learned.
Six short sentences are memorized in 1,000 epochs (``--config.train.epochs=1000``): loss 0.04
after 17 s on 2 CPU cores, and greedy decoding completes each from its first words.
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.model.block = "plain"
    config.model.num_layers = 2
    config.model.hidden_dim = 128
    config.model.key_dim = 128
    config.model.value_dim = 128
    config.model.num_heads = 1
    config.data.source = "data.jsonl"
    config.data.field = "bot"
    config.data.mode = "document"
    config.data.batch_size = 2
    config.data.sequence_length = 128
    config.data.validation_fraction = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 0
    config.optimizer.final_learning_rate = 1.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.beta2 = 0.999
    config.optimizer.clip_norm = 0.0
    config.train.epochs = 20
    config.train.eval_every = 0
    config.train.sample_every = 0
    return config
