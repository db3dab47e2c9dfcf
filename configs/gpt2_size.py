"""The size of the smallest GPT-2, 124M parameters, for eight GPUs.

    python scripts/train.py --config configs/gpt2_size.py --workdir runs/gpt2_size \
        --config.data.source=my_texts/ --config.data.tokenizer=tokenizer.json

12 layers of width 768 with 12 heads, for a tokenizer of up to 50,304 ids: GPT-2's 50,257, padded so
that meshes divide them. The MLP is 2,304 wide: forget and output gates have the other parameters of
GPT-2's 3,072. The steps are 10B tokens, 0.5M each. Without --config.data.tokenizer, bytes.

The first step of 256 tokens on 2 CPU cores, to see that it fits (4.1 GB) and trains:

    python scripts/train.py --config configs/gpt2_size.py --workdir runs/one_step \
        --config.data.batch_size=1 --config.train.gradient_accumulation=1 \
        --config.data.sequence_length=256 --config.train.steps=1 --config.train.eval_every=0 \
        --config.train.sample_every=0 --config.data.validation_fraction=0
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.model.vocab_size = 50304
    config.model.num_layers = 12
    config.model.hidden_dim = 768
    config.model.key_dim = 768
    config.model.value_dim = 768
    config.model.num_heads = 12
    config.model.mlp_dim = 2304
    config.model.precision = "bfloat16"
    config.data.batch_size = 512
    config.data.sequence_length = 1024
    config.train.gradient_accumulation = 8
    config.train.steps = 19073
    config.train.eval_every = 1000
    config.train.save_every = 1000
    config.train.sample_every = 1000
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 700
    config.optimizer.final_learning_rate = 0.1
    config.optimizer.beta2 = 0.95
    return config
