"""Models in training: one of ours, or a peer."""

import abc


class Learner(abc.ABC):
    """A model and its training."""

    parameters: int

    @abc.abstractmethod
    def step(self) -> None:
        """Take one optimizer step, or dispatch it."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait for dispatched steps."""

    @abc.abstractmethod
    def evaluate(self, limit_tokens: int = 0) -> float:
        """Nats per token of held-out text, each token scored once; 0 scores all of it."""

    def random_blocks(self, tokens: int) -> float | None:
        """nanoGPT's estimate: nats per token of random blocks, where attention has short contexts.

        None for recurrent models.
        """
        return None
