"""Explanation of what a model does with one text: every measurement of this package."""

import dataclasses
import re

import numpy as np
from absl import logging
from flax import nnx

from simplernn_jax.analysis.decomposition import (
    Contributions,
    LayerDecomposition,
    decompose_layers,
    gradient_contributions,
    map_contributions,
)
from simplernn_jax.analysis.memory import Memory, measure_memory
from simplernn_jax.analysis.recording import find_mixers
from simplernn_jax.analysis.state_value import (
    SHORT_CONTEXT,
    ContextGain,
    PositionLoss,
    choose_split,
    choose_token,
    context_gains,
    document_split,
    loss_by_position,
    loss_by_reset,
    reset_intervals,
    token_losses,
)
from simplernn_jax.analysis.token_text import Unit, begins_word, split_into_units
from simplernn_jax.config import Config
from simplernn_jax.data import Tokenizer, TokenSplit
from simplernn_jax.data.batches import document_ends
from simplernn_jax.errors import UserError, counted
from simplernn_jax.inference import generate
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.mixers.token_mixer import complete_options
from simplernn_jax.training.evaluate import Evaluation, Evaluator

EVALUATED_TOKENS = 65536
"""Most predictions of one evaluation."""

_MAX_WORD_TOKENS = 40
"""Most tokens quoted of the rest of a word."""


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
    rest: str
    """The rest of its word, which the model has not read."""
    from_all: Contributions
    """Contributions by gradient through all layers in nats, of tokens ``start .. position - 1``."""
    by_layer: tuple[Contributions, ...]
    """Shares, by layer, of ``start .. stop - 1`` in the output after token ``position - 1``."""


@dataclasses.dataclass(frozen=True)
class StateValue:
    """Value of the state, and the text it was measured on."""

    evaluated: str
    """Description of the text."""
    window: int
    """Tokens of one training window."""
    by_position: PositionLoss
    by_reset: dict[int, Evaluation]
    """Evaluations by tokens between two resets; 0 is never."""


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
    memory: Memory
    """Over the whole text."""
    chosen: ChosenToken
    """The prediction whose contributions are shown."""
    state_value: StateValue
    """What the state contributes to the predictions."""
    characters_per_token: float
    """Mean over the text."""
    attention_context: int
    """Tokens that a layer of attention sees."""
    context_gain: ContextGain | None
    """Over the last predictions of the text; None if it is too short."""

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
      map_tokens: most tokens of the maps, which begin at a word and end a little after the chosen
        token.
      validation: held-out text of the run; see `choose_split`.

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
    document = document_split(ids, len(text.encode("utf-8")))
    logging.info("predicting every token of the text ...")
    losses = token_losses(evaluator, params, document)
    logging.info("predicting with %d tokens of context ...", SHORT_CONTEXT)
    gain, gains = context_gains(evaluator, params, ids, losses)
    reason = "it was named by the user"
    if token is None:
        token, reason = choose_token(gains, len(ids))
    stop = min(len(ids), token + map_tokens // 8)
    start = _word_start(tokenizer, ids, max(0, stop - map_tokens), map_tokens // 8)
    start = min(start, token - 1)
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
        rest=_rest_of_word(tokenizer, ids, token),
        from_all=gradient_contributions(model, ids[start:token], state, int(ids[token])),
        by_layer=tuple(map_contributions(layer, token - 1 - start) for layer in layers),
    )
    split, name = choose_split(document, validation)
    return Explanation(
        tokens=ids,
        start=start,
        stop=stop,
        units=split_into_units(tokenizer, ids[start:stop], ids[:start]),
        mixers=config.model.mixers,
        layers=layers,
        memory=measure_memory(model, ids),
        chosen=chosen,
        state_value=_state_value(evaluator, params, config.data.sequence_length, split, name),
        characters_per_token=len(text) / (len(ids) - 1),
        attention_context=_context(config),
        context_gain=gain,
    )


def _context(config: Config) -> int:
    return int(complete_options("attention", config.model).mixer_options["context"])


def _word_start(tokenizer: Tokenizer, ids: np.ndarray, start: int, most: int) -> int:
    """Return the first word start at or after `start`, within `most` tokens; otherwise `start`."""
    if start == 0:
        return 0
    units = split_into_units(tokenizer, ids[start - 1 : start + most], ids[: start - 1])
    begins = (unit.start for i, unit in enumerate(units) if i and begins_word(units, i))
    return start - 1 + next(begins, 1)


def _rest_of_word(tokenizer: Tokenizer, ids: np.ndarray, token: int) -> str:
    """Return the text from after a token, or the character it is of, to the next space.

    Nothing if the space is far, or the token ends in one.
    """
    stop = token + 1 + _MAX_WORD_TOKENS
    first, *others = split_into_units(tokenizer, ids[token:stop], ids[:token])
    if first.text[-1:].isspace():
        return ""
    text = "".join(unit.text for unit in others)
    words = re.match(r"\S*(?=\s)|\S*$", text)
    return words[0] if words is not None else ""


def _state_value(
    evaluator: Evaluator, params: nnx.State, window: int, split: TokenSplit, name: str
) -> StateValue:
    scored = min(EVALUATED_TOKENS, split.num_predictions)
    longest = int(np.max(document_ends(split) - split.document_starts))
    intervals = reset_intervals(min(longest, EVALUATED_TOKENS), window)
    logging.info("measuring the loss of %d predictions by position ...", scored)
    by_position = loss_by_position(evaluator, params, split, EVALUATED_TOKENS, window)
    return StateValue(
        f"{name}: {scored:,} of its {counted(split.num_predictions, 'prediction')}",
        window,
        by_position,
        loss_by_reset(evaluator, params, split, EVALUATED_TOKENS, intervals),
    )
