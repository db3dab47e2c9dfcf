"""Gated linear attention at the published size of 340M parameters, over eight devices.

    python scripts/train.py --config configs/gla_340m.py --workdir runs/gla_340m \
        --config.data.source=my_texts/ --config.data.tokenizer=tokenizer.json

341.7M parameters (arXiv:2312.06635, section 5.1; flash-linear-attention's ``gla_340M.json``), for a
tokenizer of 32,000 ids. 30,720 steps of 524,288 tokens are 16.1B (the paper: 15B). Each device
holds 0.5 GB of parameters and optimizer state, and two sequences at a time; docs/mixers.md has its
memory.
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.model.block = "swiglu"
    config.model.mixer = "gla"
    config.model.vocab_size = 32000
    config.model.num_layers = 24
    config.model.hidden_dim = 1024
    config.model.key_dim = 512
    config.model.value_dim = 1024
    config.model.num_heads = 4
    config.model.mlp_dim = 2816
    config.model.tie_embeddings = True
    config.model.precision = "bfloat16"
    config.mesh.fsdp = 8
    config.data.batch_size = 256
    config.data.sequence_length = 2048
    config.train.gradient_accumulation = 16
    config.train.remat = "block"
    config.train.steps = 30720
    config.train.eval_every = 1000
    config.train.save_every = 1000
    config.train.sample_every = 1000
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1024
    config.optimizer.final_learning_rate = 0.1
    config.optimizer.weight_decay = 0.01
    config.optimizer.beta2 = 0.95
    return config
