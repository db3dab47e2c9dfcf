"""Prefill and decoding as ONNX graphs."""
