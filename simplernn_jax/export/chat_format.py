"""The text that a chat template puts around messages, for programs that have no Jinja."""

from typing import Any

from absl import logging

from simplernn_jax.data.chat_template import ChatTemplate, Message, TemplateError
from simplernn_jax.errors import UserError

_MARK = "question 8254093"
_PROBES = ("x", "2 > 1  \n\n\tand\r\n more", "É漢😀 don't", "<b>&amp;{{ 1 }}{% x %}\\n")


def chat_format(template: str) -> dict[str, Any] | None:
    """Return the text around messages, as `Conversation` renders them.

    Returns:
      ``first`` and ``next``: the parts before and after the first question and each later one, up
      to the answer; ``end_of_turn``: the text after an answer; ``stop``: the part of it that ends
      generation. Questions have no white space at their ends, which many templates remove.
      None without a template or, with a warning, if the template does more than that.
    """
    try:
        return _derive(ChatTemplate(template)) if template else None
    except (UserError, TemplateError) as error:
        logging.warning("this export continues text instead of chatting: %s", error)
        return None


def _derive(template: ChatTemplate) -> dict[str, Any]:
    mark: Message = {"role": "user", "content": _MARK}
    first = template.render([mark], add_generation_prompt=True).split(_MARK)
    later = template.render_next([mark]).split(_MARK)
    answer: Message = {"role": "assistant", "content": "answer"}
    for probe in _PROBES:
        message: Message = {"role": "user", "content": probe}
        messages = [message, answer, message, answer, message]
        turns = [probe.join(first), probe.join(later), probe.join(later)]
        expected = f"answer{template.end_of_turn}".join(turns)
        if template.render(messages, add_generation_prompt=True) != expected:
            raise TemplateError("the template changes messages, or the text around them varies")
    end = {"end_of_turn": template.end_of_turn, "stop": template.stop}
    return {"first": first, "next": later, **end}
