"""Which earlier tokens one prediction was made of: through all layers, and layer by layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis.accounts import LayerAccount
from simplernn_jax.analysis.recording import record
from simplernn_jax.array_types import ModelState
from simplernn_jax.models import LanguageModel


class Contributions(NamedTuple):
    """What each token gave, and what all before them gave through the initial state."""

    tokens: np.ndarray
    """float64 [n]."""
    state: float


def gradient_contributions(
    model: LanguageModel, tokens: np.ndarray, state: ModelState, target: int
) -> Contributions:
    """Gradient times input of log p(target) after `tokens`, in nats.

    A token's embedding times the gradient with respect to it: what the prediction would lose, to
    first order, if that embedding were scaled to zero. (Gradient times input: Shrikumar et al.
    2016, arXiv:1605.01713.) The initial state is taken in the same way. To first order only: the
    parts need not add up to log p.

    Args:
      model: the language model.
      tokens: [n] ids, n at least 1.
      state: before the first of them, one row.
      target: the id predicted after the last of them.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def gradients(
        params: nnx.State, tokens: jax.Array, state: ModelState, target: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)

        def log_probability(shift: jax.Array, state: ModelState) -> jax.Array:
            hidden = record(model, tokens, state, shift=shift).hidden
            return jax.nn.log_softmax(model.logits(hidden[0, -1]))[target]

        embeddings = model.embedding(tokens)
        # A state may hold counters, which have no gradient.
        gradient = jax.grad(log_probability, argnums=(0, 1), allow_int=True)
        by_token, by_state = gradient(jnp.zeros_like(embeddings), state)
        products = [
            jnp.sum(slope.astype(jnp.float32) * x.astype(jnp.float32))
            for slope, x in zip(jax.tree.leaves(by_state), jax.tree.leaves(state), strict=True)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return jnp.sum(by_token * embeddings, axis=-1)[0], sum(products, jnp.zeros(()))

    by_token, by_state = gradients(
        params, np.asarray(tokens, np.int32)[None], state, np.int32(target)
    )
    return Contributions(np.asarray(by_token, np.float64), float(by_state))


def map_contributions(account: LayerAccount, row: int) -> Contributions:
    """What each token gives to one output of a layer's mixer, as shares that add up to 1.

    A head's output is a sum, y_t = sum_j A_tj v_j + (what the initial state gives). Each summand
    counts by how far it goes in the direction of y_t: ``<A_tj v_j, y_t> / <y_t, y_t>``. A negative
    share points the other way. The mean over the heads is returned.

    Args:
      account: of one layer, one row of a batch.
      row: t, the output to take apart.
    """
    weights = np.asarray(account.weights[0, :, row], np.float64)  # [H, T]
    values = np.asarray(account.values[0], np.float64)  # [T, H, V]
    output = np.asarray(account.output[0, row], np.float64)  # [H, V]
    from_state = np.asarray(account.from_state[0, row], np.float64)
    squares = np.maximum(np.sum(output**2, axis=-1), np.finfo(np.float64).tiny)  # [H]
    along = np.einsum("thv,hv->ht", values, output) / squares[:, None]
    state = np.sum(from_state * output, axis=-1) / squares
    return Contributions(np.mean(weights * along, axis=0), float(np.mean(state)))
