"""Export of a trained model to formats that run without this project; see `exporting`."""

FORMATS = ("html", "huggingface", "safetensors", "stablehlo", "onnx")

WEIGHT_TYPES = ("float32", "float16", "int8")
"""Of the weights in an HTML file."""
