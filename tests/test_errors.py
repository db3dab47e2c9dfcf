"""Messages are one line that a terminal can show."""

from simplernn_jax.errors import MAX_MESSAGE, UserError, counted


def test_control_characters_and_line_breaks_do_not_reach_the_terminal():
    assert str(UserError("a\x1b[31mb\n  c\x00")) == r"a\x1b[31mb c\x00"


def test_the_middle_of_a_long_message_is_left_out():
    text = str(UserError("where: " + "x" * 5_000_000 + "; do this"))
    assert text.startswith("where: xxx")
    assert text.endswith("xxx")
    assert len(text) <= MAX_MESSAGE + 5
    text = str(UserError("where: " + "x" * 5_000 + "; do this"))
    assert text.endswith("; do this")


def test_numbers_agree_with_their_nouns():
    counts = [counted(number, "token") for number in (0, 1, 2, 1000)]
    assert counts == ["0 tokens", "1 token", "2 tokens", "1,000 tokens"]
