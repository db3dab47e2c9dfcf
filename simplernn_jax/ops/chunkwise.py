"""The recurrence as matmuls over chunks of time, and its gradient.

Notation, per head: l is the log gate, b_i its inclusive sum from the start of a chunk of C tokens,
S the state at the chunk's start. The chunk's output and next state are::

    y_i = (q_i e^{b_i})^T S + sum_{j <= i} A_ij v_j,     A_ij = sum_K q_i k_j e^{b_i - b_j}
    S'  = diag(e^{b_C}) S + sum_j (k_j e^{b_C - b_j}) v_j^T

`intra_chunk.py` computes A and the decayed q and k for a group of chunks. A short unrolled loop
then computes their states, and matmuls over the whole group the rest.
docs/recurrence.md derives the gradient.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from simplernn_jax.ops.chunk_loops import Chunks, backward_loop, forward_loop
from simplernn_jax.ops.intra_chunk import BLOCK
from simplernn_jax.ops.scan import RecurrenceInputs

GROUP_ELEMENTS = 2**18
"""Largest array of one group of chunks: 1 MiB of float32 stays in a core's cache, and fewer, larger
operations cost less than many small ones."""

MAX_GROUP = 16
"""Maximum chunks of a group; the loop over their states is unrolled."""


def chunkwise(
    inputs: RecurrenceInputs, chunk_size: int | None, *, with_starts: bool = False
) -> tuple[jax.Array, ...]:
    """Compute the recurrence chunk by chunk, with matmuls inside chunks.

    Returns:
      The output and the final state as `scan`, and, if `with_starts`, the chunk-start states, of
      the shapes of `start_shapes`, in the dtype of the state.
    """
    length = inputs.q.shape[1]
    inputs, parts = _divide(inputs, chunk_size)
    state, outputs, starts = inputs.state, [], []
    for part in parts:
        state, output, part_starts = forward_loop(
            part, part.slice(inputs, state), with_starts=with_starts
        )
        outputs.append(output)
        starts.append(part_starts)
    return _join(outputs, length), state, *(starts if with_starts else ())


def start_shapes(
    shape: Sequence[int], value_dim: int, chunk_size: int | None
) -> list[tuple[int, ...]]:
    """Return the shapes of the chunk-start states that `chunkwise` saves for q of `shape`."""
    batch, _, heads, key_dim = shape
    shapes: list[tuple[int, ...]] = []
    for part in _parts(shape, value_dim, chunk_size):
        groups = (part.stop - part.start) // (part.size * part.group)
        shapes.append((groups, part.group, batch * heads, key_dim, value_dim))
    return shapes


def chunkwise_gradient(
    inputs: RecurrenceInputs,
    d_output: jax.Array,
    d_final_state: jax.Array,
    chunk_size: int | None,
    starts: Sequence[jax.Array] = (),
    final_state: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Compute the gradients of q, k, v, log_gate and the initial state, of their shapes and dtypes.

    `starts` and `final_state` are those of `chunkwise`; without them they are recomputed.
    """
    length = inputs.q.shape[1]
    inputs, parts = _divide(inputs, chunk_size)
    (d_output,) = _pad((d_output,), inputs.q.shape[1] - length)
    if final_state is None:
        starts, final_state = [], inputs.state
        for part in parts:
            final_state, _, part_starts = forward_loop(
                part, part.slice(inputs, final_state), with_output=False, with_starts=True
            )
            starts.append(part_starts)
    gradients: list[list[jax.Array]] = []
    d_state, end = d_final_state, final_state
    for part, part_starts in zip(reversed(parts), reversed(starts), strict=True):
        d_part = d_output[:, part.start : part.stop]
        *part_gradients, d_state = backward_loop(
            part, part.slice(inputs, end), d_part, part_starts, d_state
        )
        end = part_starts[0, 0].reshape(end.shape)
        gradients.insert(0, part_gradients)
    return *(_join(whole, length) for whole in zip(*gradients, strict=True)), d_state


def _divide(
    inputs: RecurrenceInputs, chunk_size: int | None
) -> tuple[RecurrenceInputs, list[Chunks]]:
    """Pad T to a multiple of the chunk size and split it into loops."""
    q, k, v, log_gate, state, reset = inputs
    parts = _parts(q.shape, v.shape[3], chunk_size)
    padding = parts[-1].stop - q.shape[1]
    if reset is not None:
        log_gate = jnp.where(reset[:, :, None, None], 0, log_gate)
        # Padding must not reset: the final state is that of the last real token.
        reset = jnp.pad(reset, ((0, 0), (0, padding)))
    # q = k = v = 0 and a gate of 1 leave the state as it is.
    q, k, v, log_gate = _pad((q, k, v, log_gate), padding)
    return RecurrenceInputs(q, k, v, log_gate, state, reset), parts


def _parts(shape: Sequence[int], value_dim: int, chunk_size: int | None) -> list[Chunks]:
    batch, length, heads, key_dim = shape
    if chunk_size is None:
        chunk_size = choose_chunk_size(length)
    length += -length % chunk_size
    group = choose_group(batch * heads, chunk_size, key_dim, value_dim, length // chunk_size)
    whole = length - length % (chunk_size * group)
    rest = (length - whole) // chunk_size
    parts = [Chunks(0, whole, chunk_size, group), Chunks(whole, length, chunk_size, rest)]
    return [part for part in parts if part.stop > part.start]


def _pad(arrays: Sequence[jax.Array], padding: int) -> list[jax.Array]:
    if not padding:
        return list(arrays)
    return [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in arrays]


def _join(parts: Sequence[jax.Array], length: int) -> jax.Array:
    whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return whole[:, :length]


def choose_group(heads: int, chunk_size: int, key_dim: int, value_dim: int, chunks: int) -> int:
    """Choose the chunks per group, a power of two, by their arrays' size; `heads` is B * H."""
    elements = heads * max(chunk_size * max(key_dim, value_dim), key_dim * value_dim)
    group = 1
    while 2 * group <= min(MAX_GROUP, chunks) and 2 * group * elements <= GROUP_ELEMENTS:
        group *= 2
    return group


def choose_chunk_size(length: int) -> int:
    """Choose the tokens per chunk: 32 is about the fastest on a CPU; not tuned on GPUs."""
    best = 32
    while best > BLOCK and best >= 2 * length:
        best //= 2
    return best
