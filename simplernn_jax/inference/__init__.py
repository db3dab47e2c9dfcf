"""Writing with a trained model."""

from simplernn_jax.inference.decode import Generation, generate
from simplernn_jax.inference.programs import DecoderState
from simplernn_jax.inference.text import TextStream, generate_text

__all__ = ["DecoderState", "Generation", "TextStream", "generate", "generate_text"]
