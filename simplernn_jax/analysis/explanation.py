"""All that can be said about one text and one model, as one value."""

import dataclasses

import numpy as np
from flax import nnx

from simplernn_jax.analysis.accounts import LayerAccount, account_for_layers
from simplernn_jax.analysis.contributions import (
    Contributions,
    gradient_contributions,
    map_contributions,
)
from simplernn_jax.analysis.memory import Memory, measure_memory, read_state
from simplernn_jax.analysis.state_value import (
    PositionLoss,
    choose_split,
    document_split,
    loss_by_position,
    loss_by_reset,
    reset_intervals,
    short_context_losses,
    token_losses,
)
from simplernn_jax.analysis.token_text import Unit, counted, split_into_units
from simplernn_jax.config import Config
from simplernn_jax.data import Tokenizer, TokenSplit
from simplernn_jax.data.batches import document_ends
from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.evaluate import Evaluation, Evaluator

SHORT_CONTEXT = 32
"""Tokens; what a prediction gains from all of the past is measured against these alone."""

EVALUATED_TOKENS = 65536
"""Predictions of one evaluation at most."""

_CANDIDATES = 1024
"""The chosen token is looked for among so many at the end of the text."""


@dataclasses.dataclass(frozen=True)
class ChosenToken:
    """The prediction that is taken apart."""

    position: int
    """N: the N-th token of the text; BOS before it is 0."""
    reason: str
    nats: float
    """-log p of it, given all tokens before."""
    units: list[Unit]
    """Readable pieces of tokens ``start .. position - 1``, counted from `start`."""
    predicted: Unit
    """The token itself."""
    from_all: Contributions
    """Through all layers by gradient, in nats, of tokens ``start .. position - 1``."""
    by_layer: tuple[Contributions, ...]
    """Shares of the output after token ``position - 1``, of tokens ``start .. stop - 1``."""


@dataclasses.dataclass(frozen=True)
class StateValue:
    """What the state is worth, and on what that was measured."""

    evaluated: str
    """A phrase for people."""
    window: int
    """Tokens of one training window."""
    by_position: PositionLoss
    by_reset: dict[int, Evaluation]
    """By tokens between two resets; 0 is never."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns."""

    tokens: np.ndarray
    """int [n], BOS and the text."""
    start: int
    """First position of the maps."""
    stop: int
    """Position after the last one of the maps."""
    units: list[Unit]
    """Readable pieces of tokens ``start .. stop - 1``, counted from `start`."""
    mixers: tuple[str, ...]
    """By layer, ``simple_rnn`` or ``attention``."""
    accounts: tuple[LayerAccount, ...]
    """By layer, of tokens ``start .. stop - 1``, B = 1."""
    memory: Memory
    """Over the whole text."""
    chosen: ChosenToken
    state_value: StateValue

    @property
    def layer_names(self) -> list[str]:
        """Of all layers, for people; they say which ones are attention."""
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
    """Reads `text` as one document from a zero state and accounts for what the model did.

    Args:
      model: the language model.
      tokenizer: the one it was trained with.
      config: of its run.
      text: any text with at least one token.
      token: N in 1 .. tokens of the text, the prediction to take apart; None takes the one that
        gains most from what stands more than `SHORT_CONTEXT` tokens before it.
      map_tokens: most tokens of the maps, which end a little after the chosen token.
      validation: held-out text of the run; see `choose_split`.

    Raises:
      UserError: `text` has no token or none that the tokenizer can encode, or `token` is not in it.
    """
    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)]).astype(np.int32)
    if len(ids) < 2:
        raise UserError("the text is empty; give at least one character")
    if token is not None and not 1 <= token < len(ids):
        raise UserError(
            f"token {token}: the text has {counted(len(ids) - 1, 'token')}; "
            f"name one of 1 to {len(ids) - 1}"
        )
    params = nnx.state(model, nnx.Param)
    evaluator = Evaluator(config, tokenizer.pad_id)
    document = document_split(ids, len(text.encode("utf-8")))
    losses = token_losses(evaluator, params, document)
    reason = "named by the user"
    if token is None:
        token, reason = choose_token(model, ids, losses)
    stop = min(len(ids), token + map_tokens // 8)
    start = max(0, stop - map_tokens)
    state = read_state(model, ids[:start])
    accounts = account_for_layers(model, ids[start:stop], state)
    chosen = ChosenToken(
        position=token,
        reason=reason,
        nats=float(losses[token - 1]),
        units=split_into_units(tokenizer, ids[start:token], ids[:start]),
        predicted=split_into_units(tokenizer, ids[token : token + 1], ids[:token])[0],
        from_all=gradient_contributions(model, ids[start:token], state, int(ids[token])),
        by_layer=tuple(map_contributions(account, token - 1 - start) for account in accounts),
    )
    return Explanation(
        tokens=ids,
        start=start,
        stop=stop,
        units=split_into_units(tokenizer, ids[start:stop], ids[:start]),
        mixers=config.model.mixers,
        accounts=accounts,
        memory=measure_memory(model, ids),
        chosen=chosen,
        state_value=_state_value(
            evaluator, params, config.data.sequence_length, *choose_split(document, validation)
        ),
    )


def choose_token(model: LanguageModel, ids: np.ndarray, losses: np.ndarray) -> tuple[int, str]:
    """The token that gains most from all that stands before it, and a sentence that says so.

    Args:
      model: the language model.
      ids: [n] tokens, BOS included.
      losses: [n - 1], -log p of tokens 1 .. n - 1 given all before them.
    """
    candidates = np.arange(max(SHORT_CONTEXT + 1, len(ids) - _CANDIDATES), len(ids))
    if not len(candidates):
        return len(ids) - 1, f"the last one: no other stands after more than {SHORT_CONTEXT} tokens"
    short = short_context_losses(model, ids, candidates, SHORT_CONTEXT)
    gains = short - losses[candidates - 1]
    best = int(np.argmax(gains))
    return int(candidates[best]), (
        f"what stands more than {SHORT_CONTEXT} tokens before it lowers its loss by "
        f"{gains[best]:.2f} nats, more than that of any other"
    )


def _state_value(
    evaluator: Evaluator, params: nnx.State, window: int, split: TokenSplit, name: str
) -> StateValue:
    scored = min(EVALUATED_TOKENS, split.num_predictions)
    longest = int(np.max(document_ends(split) - split.document_starts))
    intervals = reset_intervals(min(longest, EVALUATED_TOKENS), window)
    return StateValue(
        f"{name}: {scored:,} of its {counted(split.num_predictions, 'prediction')}",
        window,
        loss_by_position(evaluator, params, split, EVALUATED_TOKENS, window),
        loss_by_reset(evaluator, params, split, EVALUATED_TOKENS, intervals),
    )
