"""Characters of one text file, first 90 % for training: the loss of nanoGPT's GPU settings.

    python scripts/train.py --config configs/shakespeare_gpu_budget.py --workdir runs/gpu_budget \
        --config.data.source=tinyshakespeare.txt

5,600 steps of 8 sequences of 256 characters. Seeds 0 and 1 on tinyshakespeare: 1.400 and 1.409
nats/char on the last 10 %, after 6:22 and 6:28 of training on one core of a Xeon with AMX.
nanoGPT's README gives 1.4697 for 10.65M parameters and its GPU settings, on an A100.
docs/results.md says how the settings were chosen. A sample of seed 0, at temperature 0.8:

    ROMEO:
    What news?

    ROMEO:
    Ay, no, I am here: the crown as mine
    I would not only shall make it not. Here comes
    My heart the court?
"""

from simplernn_jax import load_config
from simplernn_jax.config import Config


def get_config() -> Config:
    config = load_config("shakespeare")
    config.model.dropout = 0.1
    config.data.batch_size = 8
    config.data.sequence_length = 256
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.3
    config.train.steps = 5600
    config.train.eval_every = 1400
    config.train.save_every = 1400
    return config
