"""A small chat model of sums, words and a number to remember, on conversations made for it.

python scripts/make_conversations.py conversations.jsonl
python scripts/train.py --config configs/chat.py --workdir runs/chat
python scripts/chat.py --workdir runs/chat
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.model.num_layers = 2
    config.model.hidden_dim = 64
    config.model.key_dim = 64
    config.model.value_dim = 64
    config.model.num_heads = 2
    config.model.mlp_dim = 256
    config.data.source = "conversations.jsonl"
    config.data.template = "roles"
    config.data.loss_mask = "assistant"
    config.data.batch_size = 16
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.6e-2
    config.train.steps = 500
    config.train.eval_every = 250
    config.train.save_every = 250
    config.train.sample_every = 0
    config.train.sample_prompt = "what is 3+4?"
    return config
