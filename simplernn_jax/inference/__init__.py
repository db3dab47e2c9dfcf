"""Generation with a trained model."""

from simplernn_jax.inference.conversation import Conversation
from simplernn_jax.inference.decode import Generation, generate
from simplernn_jax.inference.decoder_weights import quantize_model
from simplernn_jax.inference.state import DecoderState, fork_state, load_state, save_state
from simplernn_jax.inference.text import Texts, TextStream, generate_text

__all__ = [
    "Conversation",
    "DecoderState",
    "Generation",
    "TextStream",
    "Texts",
    "fork_state",
    "generate",
    "generate_text",
    "load_state",
    "quantize_model",
    "save_state",
]
