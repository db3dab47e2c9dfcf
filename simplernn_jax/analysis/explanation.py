"""All that can be said about one text and one model, as one value."""

import dataclasses
import re

import numpy as np
from flax import nnx

from simplernn_jax.analysis.accounts import LayerAccount, account_for_layers
from simplernn_jax.analysis.context_gain import (
    SHORT_CONTEXT,
    ContextGain,
    choose_token,
    context_gains,
)
from simplernn_jax.analysis.contributions import (
    Contributions,
    gradient_contributions,
    map_contributions,
)
from simplernn_jax.analysis.memory import Memory, measure_memory, read_state
from simplernn_jax.analysis.progress import Report, begin_stage, no_report
from simplernn_jax.analysis.state_value import (
    PositionLoss,
    choose_split,
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
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.evaluate import Evaluation, Evaluator

EVALUATED_TOKENS = 65536
"""Predictions of one evaluation at most."""

_LONGEST_WORD = 40
"""Tokens of the rest of a word that is quoted."""


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
    rest: str
    """The rest of its word, which the model has not read."""
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
    characters_per_token: float
    """Of the text."""
    attention_context: int
    """Tokens that a layer of attention looks back on."""
    context_gain: ContextGain | None
    """Over the last predictions of the text; None where it is too short."""

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
    report: Report = no_report,
) -> Explanation:
    """Reads `text` as one document from a zero state and accounts for what the model did.

    Args:
      model: the language model.
      tokenizer: the one it was trained with.
      config: of its run.
      text: any text with at least one token.
      token: N in 1 .. tokens of the text, the prediction to take apart; None takes the one that
        gains most from what stands more than `SHORT_CONTEXT` tokens before it.
      map_tokens: most tokens of the maps, which begin with a word and end a little after the
        chosen token.
      validation: held-out text of the run; see `choose_split`.
      report: takes lines about the progress.

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
    losses = token_losses(evaluator, params, document, report)
    begin_stage(report, f"predicting with {SHORT_CONTEXT} tokens of context")
    gain, gains = context_gains(model, ids, losses)
    reason = "named by the user"
    if token is None:
        token, reason = choose_token(gains, len(ids))
    stop = min(len(ids), token + map_tokens // 8)
    start = _word_start(tokenizer, ids, max(0, stop - map_tokens), map_tokens // 8)
    start = min(start, token - 1)
    begin_stage(report, f"taking {counted(config.model.num_layers, 'layer')} apart")
    state = read_state(model, ids[:start])
    accounts = account_for_layers(model, ids[start:stop], state)
    chosen = ChosenToken(
        position=token,
        reason=reason,
        nats=float(losses[token - 1]),
        units=split_into_units(tokenizer, ids[start:token], ids[:start]),
        predicted=split_into_units(tokenizer, ids[token : token + 1], ids[:token])[0],
        rest=_rest_of_word(tokenizer, ids, token + 1),
        from_all=gradient_contributions(model, ids[start:token], state, int(ids[token])),
        by_layer=tuple(map_contributions(account, token - 1 - start) for account in accounts),
    )
    split, name = choose_split(document, validation)
    return Explanation(
        tokens=ids,
        start=start,
        stop=stop,
        units=split_into_units(tokenizer, ids[start:stop], ids[:start]),
        mixers=config.model.mixers,
        accounts=accounts,
        memory=measure_memory(model, ids, report),
        chosen=chosen,
        state_value=_state_value(
            evaluator, params, config.data.sequence_length, split, name, report
        ),
        characters_per_token=len(text) / (len(ids) - 1),
        attention_context=config.model.attention_context,
        context_gain=gain,
    )


def _word_start(tokenizer: Tokenizer, ids: np.ndarray, start: int, most: int) -> int:
    """The first position from `start` on where a word begins; `start` if none of `most` is one."""
    if start == 0:
        return 0
    units = split_into_units(tokenizer, ids[start - 1 : start + most], ids[: start - 1])
    begins = (unit.start for i, unit in enumerate(units) if i and begins_word(units, i))
    return start - 1 + next(begins, 1)


def _rest_of_word(tokenizer: Tokenizer, ids: np.ndarray, start: int) -> str:
    """The text from `start` to the next space, if that comes soon."""
    units = split_into_units(tokenizer, ids[start : start + _LONGEST_WORD], ids[:start])
    text = "".join(unit.text for unit in units)
    words = re.match(r"\S*(?=\s)|\S*$", text)
    return words[0] if words is not None else ""


def _state_value(
    evaluator: Evaluator,
    params: nnx.State,
    window: int,
    split: TokenSplit,
    name: str,
    report: Report,
) -> StateValue:
    scored = min(EVALUATED_TOKENS, split.num_predictions)
    longest = int(np.max(document_ends(split) - split.document_starts))
    intervals = reset_intervals(min(longest, EVALUATED_TOKENS), window)
    begin_stage(report, f"measuring the loss of {scored:,} predictions by position")
    by_position = loss_by_position(evaluator, params, split, EVALUATED_TOKENS, window)
    return StateValue(
        f"{name}: {scored:,} of its {counted(split.num_predictions, 'prediction')}",
        window,
        by_position,
        loss_by_reset(evaluator, params, split, EVALUATED_TOKENS, intervals, report),
    )
