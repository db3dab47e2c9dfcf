"""Export of a trained model to formats that run without this project; see `exporting`."""

FORMATS = ("html", "huggingface", "safetensors", "stablehlo", "onnx")

QUANTIZATIONS = ("none", "float16", "int8")
"""Types of the weights in `QUANTIZED_FORMATS`; int8 has a scale for each row."""

QUANTIZED_FORMATS = ("html", "onnx")
