"""Generate greedily with the files of this folder: pip install jax flatbuffers safetensors

python example.py 72 101 108 108 111
"""

import json
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from jax import export

folder = Path(__file__).parent
config = json.loads((folder / "config.json").read_text())
weights = safetensors.numpy.load_file(folder / "model.safetensors")
prefill, decode = (
    export.deserialize(bytearray((folder / name).read_bytes()))
    for name in ("prefill.bin", "decode.bin")
)

tokens = np.array([[config["bos_token_id"], *map(int, sys.argv[1:])]], np.int32)
state = {
    name: np.zeros((1, *array["shape"][1:]), array["dtype"])
    for name, array in config["state"].items()
}
for _ in range(32):
    while tokens.shape[1]:
        is_long = tokens.shape[1] >= config["prefill_tokens"]
        run, length = (prefill, config["prefill_tokens"]) if is_long else (decode, 1)
        logits, state = run.call(weights, state, tokens[:, :length])
        tokens = tokens[:, length:]
    tokens = np.asarray(logits)[:, -1:].argmax(-1).astype(np.int32)
    print(tokens[0, 0], end=" ", flush=True)
print()
