"""SimpleRNN against self-attention: the same block, data and training, six aspects."""
