"""Export of a trained model to formats that run without this project; see `exporting`."""

FORMATS = ("html", "huggingface", "safetensors", "stablehlo", "onnx")

QUANTIZATIONS = {"none": FORMATS, "float16": ("html", "onnx"), "int8": ("html",)}
"""Types of the stored weights, and the formats that have them; int8 has a scale for each row."""
