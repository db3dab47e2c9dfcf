"""Decoding with parallel or residual SimpleRNN blocks as one C function; see `cpu/decode.c`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import ModelState
from simplernn_jax.ops.native import supports_native
from simplernn_jax.ops.quantization import PANEL, PackedMatrix


class DecoderWeights(NamedTuple):
    """Weights of a model, in the order of the C function's arguments.

    L layers of width D, H heads of K key and V value channels; ``[in, out]`` are the sizes of a
    matrix, and those of the layers have axis L in front.
    """

    embedding: PackedMatrix
    """[D, vocab]; scaled by sqrt(D) when looked up."""
    in_proj: PackedMatrix
    """[L, D, width] of queries, keys, values, forget gates and output gates, in this order; width
    is 3 H K + 2 H V, rounded up to a multiple of PANEL. Queries are scaled."""
    out_proj: PackedMatrix
    """[L, H V, D]"""
    mlp_in: PackedMatrix
    """[L, D, M], M a multiple of PANEL; a smaller MLP is filled with zeros."""
    mlp_out: PackedMatrix
    """[L, M, D]"""
    head: PackedMatrix
    """[D, vocab]"""
    convolution: jax.Array
    """[L, 4, D]"""
    bias: jax.Array
    """[L, width] of `in_proj`."""
    final_scale: jax.Array
    """[D]"""
    head_bias: jax.Array
    """[vocab]"""
    parallel: jax.Array
    """[1]; 1 where the MLP reads the input of the recurrence, 0 where it follows it."""

    @property
    def mlp_dim(self) -> int:
        """M."""
        return PANEL * self.mlp_in.values.shape[1]


def decode_tokens(
    weights: DecoderWeights,
    tokens: jax.Array,
    num_tokens: jax.Array,
    logits: jax.Array,
    states: ModelState,
    slots: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, ModelState]:
    """Compute logits, hidden states and states of N sequences after up to T more tokens of each.

    The bits of a sequence's results depend on itself alone, and not on how its tokens are divided
    among calls. Memory grows with N T: divide long prompts.

    Args:
      weights: of the model.
      tokens: ``[N, T]`` int32, T at least 1; ids outside of the vocabulary give NaN.
      num_tokens: ``[N]`` int32, 0 to T; the first tokens of each sequence that are computed. A
        sequence without any keeps `logits` and states.
      logits: ``[S, vocab]`` float32, of all slots.
      states: of L layers, each S ``[S, H, K, V]`` and the convolution's inputs ``[S, 3, D]``,
        float32. XLA updates them in place where it can.
      slots: ``[N, T + 1]`` int32: token t reads the state in slot t of its sequence, and leaves its
        own state and logits in slot t + 1, or the last token alone if they have one slot. None:
        sequence n has slot n.

    Returns:
      The logits; the inputs of the head at all tokens, ``[N, T, D]``, zeros from `num_tokens` on;
      and the states.
    """
    if not supports_native(jnp.float32):
        raise ValueError("decode_tokens requires a CPU and a C compiler")
    # The C function checks the shapes and dtypes of all its arguments.
    leaves, structure = jax.tree.flatten(states)
    (num_sequences, length), (*_, heads, _, value_dim) = tokens.shape, leaves[0].shape
    if slots is None:
        own = jnp.arange(num_sequences, dtype=jnp.int32)[:, None]
        slots = jnp.broadcast_to(own, (num_sequences, length + 1))
    dim, width = weights.final_scale.shape[0], weights.bias.shape[-1]
    per_row = 2 * dim + width + heads * value_dim + weights.mlp_dim + 4
    of_head = jax.ShapeDtypeStruct((*tokens.shape, dim), jnp.float32)
    workspace = jax.ShapeDtypeStruct((num_sequences, length * per_row), jnp.float32)
    arguments = [tokens, num_tokens, logits, *jax.tree.leaves(weights), slots, *leaves]
    results = [jax.typeof(logits), of_head, workspace, *map(jax.typeof, leaves)]
    before = len(arguments) - len(leaves)
    aliases = {2: 0} | {before + i: 3 + i for i in range(len(leaves))}
    called = jax.ffi.ffi_call("simplernn_decode", results, input_output_aliases=aliases)(*arguments)
    logits, final, _, *leaves = called
    return logits, final, jax.tree.unflatten(structure, leaves)
