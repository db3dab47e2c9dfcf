"""Explanation of what a model does with one text: every measurement of this package."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from flax import nnx

from simplernn_jax.analysis.decomposition import (
    Contributions,
    LayerDecomposition,
    decompose_layers,
    find_mixers,
    gradient_contributions,
    map_contributions,
)
from simplernn_jax.analysis.memory import (
    SHORT_CONTEXT,
    PositionLoss,
    context_gains,
    document_split,
    loss_by_position,
    measure_half_lives,
    token_losses,
)
from simplernn_jax.config import Config
from simplernn_jax.data import Tokenizer, TokenSplit
from simplernn_jax.data.batches import document_ends
from simplernn_jax.errors import UserError, counted
from simplernn_jax.inference import TextStream, generate
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.evaluate import Evaluation, Evaluator

EVALUATED_TOKENS = 65536
"""Most predictions of one evaluation."""
LONG_TEXT = 16384
"""Tokens of a text that suffice to evaluate the state on it."""


class Unit(NamedTuple):
    """Smallest sequence of tokens that ends at the end of a character."""

    start: int
    """Index of its first token."""
    stop: int
    """Index after its last token."""
    text: str
    """Text, the name of a special token, or the bytes of an incomplete character."""


def split_into_units(
    tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, context: Sequence[int] | np.ndarray = ()
) -> list[Unit]:
    """Split [n] ids into units that hold every id once, in order.

    A character that begins in `context`, the ids before, is completed in the first unit.
    """
    names = {tokenizer.bos_id: "⟨BOS⟩", tokenizer.eos_id: "⟨EOS⟩", tokenizer.pad_id: "⟨PAD⟩"}
    names |= dict(zip(tokenizer.fim_ids, ("⟨SUFFIX⟩", "⟨PREFIX⟩", "⟨MIDDLE⟩"), strict=False))
    stream = TextStream(tokenizer, context)
    units: list[Unit] = []
    start = 0
    for index, token in enumerate(int(token) for token in ids):
        text = names.get(token) or stream.feed([token])
        if text:
            units.append(Unit(start, index + 1, text))
            start = index + 1
    if start < len(ids):
        rest = tokenizer.decode_bytes(ids[start:])
        units.append(Unit(start, len(ids), "".join(f"\\x{byte:02x}" for byte in rest) or "\ufffd"))
    return units


@dataclasses.dataclass(frozen=True)
class ChosenToken:
    """The prediction that is decomposed."""

    position: int
    """N: the N-th token of the text; BOS before it is 0."""
    reason: str
    nats: float
    """-log p of the token, given all tokens before."""
    units: list[Unit]
    """Readable units of tokens ``start .. position - 1``, counted from `start`."""
    predicted: Unit
    """The token."""
    from_all: Contributions
    """Contributions by gradient through all layers in nats, of tokens ``start .. position - 1``."""
    by_layer: tuple[Contributions, ...]
    """Shares of the same tokens, by layer, in the output after token ``position - 1``."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Result of `explain`."""

    tokens: np.ndarray
    """int [n], BOS and the text."""
    start: int
    """First position of the maps."""
    stop: int
    """Position after the last one of the maps."""
    units: list[Unit]
    """Readable units of tokens ``start .. stop - 1``, counted from `start`."""
    mixers: tuple[str, ...]
    """Mixer of each layer, ``simple_rnn``, ``attention`` or ``gla``."""
    layers: tuple[LayerDecomposition, ...]
    """Decomposition of each layer, of tokens ``start .. stop - 1``, B = 1."""
    half_lives: tuple[np.ndarray | None, ...]
    """See `measure_half_lives`; over the whole text."""
    chosen: ChosenToken
    """The prediction whose contributions are shown."""
    evaluated: str
    """Description of the text that the state was evaluated on."""
    window: int
    """Tokens of one training window."""
    by_position: PositionLoss
    by_reset: dict[int, Evaluation]
    """Evaluations by tokens between two resets; 0 is never."""
    context_gains: np.ndarray
    """Of the last predictions of the text; see `memory.context_gains`."""

    @property
    def layer_names(self) -> list[str]:
        """``layer N`` or ``layer N (attention)`` for each layer."""
        return [
            f"layer {number}" + (" (attention)" if mixer == "attention" else "")
            for number, mixer in enumerate(self.mixers, 1)
        ]


def explain(
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: Config,
    text: str,
    *,
    token: int | None = None,
    map_tokens: int = 192,
    validation: TokenSplit | None = None,
) -> Explanation:
    """Read `text` as one document from a zero state and explain what the model does with it.

    Args:
      model: the language model.
      tokenizer: the one it was trained with.
      config: of its run.
      text: any text with at least one token.
      token: position N of the prediction to decompose, from 1; None takes the one that gains most
        from the text more than `SHORT_CONTEXT` tokens before it.
      map_tokens: most tokens of the maps, which end a little after the chosen token.
      validation: held-out text of the run; the state is evaluated on it unless `text` has
        `LONG_TEXT` tokens or no fewer than it.

    Raises:
      UserError: `text` is empty or cannot be encoded, or has no such `token`.
    """
    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)]).astype(np.int32)
    if len(ids) < 2:
        raise UserError("the text is empty; pass at least one character")
    if token is not None and not 1 <= token < len(ids):
        raise UserError(
            f"token {token}: the text has {counted(len(ids) - 1, 'token')}; "
            f"specify one of 1 to {len(ids) - 1}"
        )
    find_mixers(model)  # its error comes before minutes of work
    params = nnx.state(model, nnx.Param)
    evaluator = Evaluator(config, tokenizer.pad_id)
    logging.info("predicting every token of the text ...")
    losses = token_losses(evaluator, params, ids)
    gains = context_gains(evaluator, params, ids, losses)
    reason = "it was named by the user"
    if token is None and not len(gains):
        token = len(ids) - 1
        reason = f"it is the last one: none has more than {SHORT_CONTEXT} before it"
    elif token is None:
        token = len(ids) - len(gains) + int(np.argmax(gains))
        reason = (
            f"the text more than {SHORT_CONTEXT} tokens before it lowers its loss by "
            f"{gains.max():.2f} nats, more than for any other token"
        )
    stop = min(len(ids), token + map_tokens // 8)
    start = max(0, stop - map_tokens)
    logging.info("decomposing %s ...", counted(config.model.num_layers, "layer"))
    state = model.initial_state(1)
    if start:
        state = generate(model, ids[:start], max_new_tokens=0).state.layers
    layers = decompose_layers(model, ids[start:stop], state)
    chosen = ChosenToken(
        position=token,
        reason=reason,
        nats=float(losses[token - 1]),
        units=split_into_units(tokenizer, ids[start:token], ids[:start]),
        predicted=split_into_units(tokenizer, ids[token : token + 1], ids[:token])[0],
        from_all=gradient_contributions(model, ids[start:token], state, int(ids[token])),
        by_layer=tuple(map_contributions(layer, token - 1 - start) for layer in layers),
    )
    logging.info("measuring the half-lives of the memory ...")
    half_lives = measure_half_lives(model, ids)
    logging.info("measuring the loss with the state carried and reset ...")
    split, name = document_split(ids, len(text.encode("utf-8"))), "the given text"
    if validation is not None and len(ids) < min(LONG_TEXT, validation.num_predictions + 1):
        documents = len(validation.document_starts)
        split, name = validation, f"the validation split of the run (documents: {documents:,})"
    scored = counted(split.num_predictions, "prediction")
    window = config.data.sequence_length
    evaluated = params, split, EVALUATED_TOKENS
    longest = int(np.max(document_ends(split) - split.document_starts))
    powers = [4**n for n in range(1, 8) if n == 1 or 4**n < longest]
    return Explanation(
        tokens=ids,
        start=start,
        stop=stop,
        units=split_into_units(tokenizer, ids[start:stop], ids[:start]),
        mixers=config.model.mixers,
        layers=layers,
        half_lives=half_lives,
        chosen=chosen,
        evaluated=f"{name}: {min(EVALUATED_TOKENS, split.num_predictions):,} of its {scored}",
        window=window,
        by_position=loss_by_position(evaluator, *evaluated, window),
        by_reset={n: evaluator(*evaluated, n) for n in [0, *sorted({*powers, window})]},
        context_gains=gains,
    )
