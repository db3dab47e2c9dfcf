"""A first run: Python's own standard library, byte by byte.

    python scripts/train.py --config configs/base.py --workdir runs/base

11.5 MB of training text: 1.429 bits/byte on held-out files (``xz -9e``: 1.655) after 11 minutes on
one core of a Xeon with AMX. A sample at temperature 0.5:

    def parse_common_state(self, command):
        if self._command_line is None:
            command.append(self.command)
        if command:
            return command
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.data.batch_size = 8
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.warmup_steps = 100
    config.train.steps = 5600
    config.train.eval_every = 1400
    config.train.save_every = 1400
    config.train.sample_every = 2800
    config.train.sample_prompt = "def main("
    return config
