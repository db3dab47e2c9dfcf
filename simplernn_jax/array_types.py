"""Legend of axes for docs, code and tests, and the array types named by it.

B  batch: independent sequences
T  time: tokens of a sequence
H  heads of the recurrence or of attention
K  key channels of one head
V  value channels of one head
D  width of the residual stream (``hidden_dim``)
W  width of a short convolution, whose state is the last P = W - 1 inputs
C  tokens of one chunk of the recurrence
S  keys of attention: the slots of a cache, or the keys of one block of queries
"""

from typing import Any

from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

LogicalAxes = PartitionSpec
"""One logical axis, or None, for each axis of an array; those left out at the end are None."""

Tokens = Int[Array, "B T"]
SegmentIds = Int[Array, "B T"]
LossMask = Bool[Array, "B T"]
Logits = Float[Array, "B T vocab"]
TimeShardLogits = Float[Array, "B t vocab"]
Activations = Float[Array, "B T D"]
TimeShardActivations = Float[Array, "B t D"]
"""Activations of a shard of the time axis, such as the one of a pipeline stage."""
Outputs = Float[Array, "B T O"]
"""Output of a mixer, of width ``output_dim``."""

Queries = Float[Array, "B T H K"]
Keys = Float[Array, "B T H K"]
Values = Float[Array, "B T H V"]
LogGates = Float[Array, "B T H K"]
"""Logarithms of the forget gates, at most 0, float32."""
Positions = Int[Array, "B T"]
"""Number of tokens before each token in its segment."""
RecurrentState = Float[Array, "B H K V"]
"""State of one layer's recurrence, float32."""
ConvState = Float[Array, "B P D"]
"""The last P inputs of one layer's short convolution, oldest first, float32."""
SeenKeys = Float[Array, "B S H K"]
SeenValues = Float[Array, "B S H V"]
CachedKeys = Float[Array, "B H S K"]
CachedValues = Float[Array, "B H S V"]

ModelState = Any
"""A pytree with one entry per layer, or one for all stacked layers; leaves begin with axis B."""
