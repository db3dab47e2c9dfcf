"""A conversation with a chat model, whose decoder state is carried from turn to turn."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference.state import DecoderState, check_state
from simplernn_jax.inference.text import StopStrings, Texts, generate_text
from simplernn_jax.models import LanguageModel


class _TurnEnded(Exception):
    """The model has ended its turn."""


class Conversation:
    """Questions and answers. A turn costs what its own tokens cost, however many were before.

    Args:
      model: the language model.
      tokenizer: the model's.
      template: the model's; `UserError` if it has none.
      state: a finished conversation to continue, of one sequence; None begins a new one.
      system: system message of a new conversation.

    Raises:
      UserError: the state is of another model or of several sequences, or the template or
        the tokenizer rejects `system`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        state: DecoderState | None = None,
        system: str = "",
    ) -> None:
        if template is None:
            raise UserError("this model has no chat template; use generate_text")
        if state is not None:
            check_state(model, state)
            if (size := len(state.position)) != 1:
                raise UserError(f"state: {size} sequences; a conversation continues one")
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._first = state
        self._system = system
        self.turns: list[DecoderState] = []
        """States after each question and its answer."""
        try:
            tokenizer.encode(self._question(""))
        except UserError as error:
            raise UserError(f"system: {error}") from error

    @property
    def state(self) -> DecoderState | None:
        """State after the last turn; None before the first one."""
        return self.turns[-1] if self.turns else self._first

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int,
        on_text: Callable[[str], None] | None = None,
        **sampling: Any,
    ) -> str:
        """Ask, and return the answer, which ends with the model's turn or `max_new_tokens`.

        Args:
          question: what the user says.
          max_new_tokens: as for `generate`.
          on_text: called with the characters of the answer as they come.
          **sampling: temperature, top_k, top_p and seed, as for `generate`.

        Raises:
          UserError: a question that the template or the tokenizer rejects, or as for `generate`.
        """
        question = self._question(question)
        asked = self._continue(question, self.state, max_new_tokens=0).state
        answer, turn = "", StopStrings([self._template.stop])

        def show(text: str) -> None:
            nonlocal answer
            answer += text
            if on_text is not None and text:
                on_text(text)

        def take(pieces: list[str]) -> None:
            show(turn.feed(pieces[0]))
            if turn.has_ended:
                raise _TurnEnded

        with contextlib.suppress(_TurnEnded):
            settings = {"max_new_tokens": max_new_tokens, "on_text": take, **sampling}
            self._continue(None, asked, context=question, **settings)
            show(turn.finish())
        # Not the state of the generation, which may have gone past the end of the turn.
        said = self._continue(answer + self._template.end_of_turn, asked, max_new_tokens=0)
        self.turns.append(said.state)
        return answer

    def undo(self) -> None:
        """Take back the last turn, if there is one."""
        self.turns = self.turns[:-1]

    def fork(self) -> "Conversation":
        """Copy the conversation; both continue independently."""
        fork = copy.copy(self)
        fork.turns = list(self.turns)
        return fork

    def _continue(self, text: str | None, state: DecoderState | None, **settings: Any) -> Texts:
        return generate_text(self._model, self._tokenizer, text, state=state, **settings)

    def _question(self, question: str) -> str:
        """Render a question, and the beginning of its answer."""
        message = {"role": "user", "content": question}
        try:
            if self.state is not None:
                return self._template.render_next([message])
            system = [{"role": "system", "content": self._system}] if self._system else []
            return self._template.render([*system, message], add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"message: {error}") from error
