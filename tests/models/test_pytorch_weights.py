"""Weights of the PyTorch project, against its model in PyTorch (`benchmarks.torch_loop`).

What needs PyTorch itself asks for the fixture `torch` and is skipped where it is not installed.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from simplernn_jax import devices
from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.pytorch_weights import load_pytorch_weights, read_pytorch_weights

VOCAB, LAYERS, HIDDEN, KEY, VALUE = 23, 2, 11, 5, 7
WIDTHS = {
    "query_proj": (KEY, HIDDEN),
    "key_proj": (KEY, HIDDEN),
    "value_proj": (VALUE, HIDDEN),
    "gate_proj": (KEY, HIDDEN),
    "out_proj": (HIDDEN, VALUE),
}


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def reference(torch: Any) -> Any:
    from benchmarks.torch_loop import LoopModel

    torch.manual_seed(0)
    return LoopModel(VOCAB, LAYERS, HIDDEN, KEY, VALUE)


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    """A state dict as the reference has it, in NumPy."""
    rng = np.random.default_rng(0)
    shapes = {"lm_head": (VOCAB, HIDDEN)}
    for index in range(LAYERS):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in WIDTHS.items()}
    arrays = {"embedding.weight": rng.normal(size=(VOCAB, HIDDEN))}
    for name, shape in shapes.items():
        arrays[f"{name}.weight"] = rng.normal(size=shape)
        arrays[f"{name}.bias"] = rng.normal(size=shape[0])
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def save_safetensors(state: dict[str, np.ndarray], path: Path) -> str:
    safetensors.numpy.save_file(state, str(path))
    return str(path)


@pytest.mark.parametrize("form", ["bare.pt", "nested.pt", "weights.safetensors"])
def test_logits_equal_those_of_pytorch(tmp_path, torch, reference, form):
    state = reference.state_dict()
    if form == "weights.safetensors":
        save_safetensors({name: value.numpy() for name, value in state.items()}, tmp_path / form)
    else:
        content = {"model_state_dict": state, "epoch": 3} if form == "nested.pt" else state
        torch.save(content, tmp_path / form)
    model = load_pytorch_weights(str(tmp_path / form))
    tokens = np.random.default_rng(1).integers(0, VOCAB, size=(3, 67))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).numpy()
    logits, _ = model(jnp.asarray(tokens, jnp.int32))
    chex.assert_type(logits, jnp.float32)
    chex.assert_trees_all_close(
        np.asarray(logits), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )


def test_half_precision_becomes_float32(tmp_path, torch, state):
    halves = {name: array.astype(jnp.bfloat16) for name, array in state.items()}
    paths = [save_safetensors(halves, tmp_path / "half.safetensors"), str(tmp_path / "half.pt")]
    torch.save({n: torch.from_numpy(a).bfloat16() for n, a in state.items()}, paths[1])
    expected = {name: array.astype(np.float32) for name, array in halves.items()}
    for path in paths:
        weights = read_pytorch_weights(path)
        chex.assert_type(list(weights.values()), np.float32)
        chex.assert_trees_all_equal(weights, expected)


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("saved_by_torch", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, torch, saved_by_torch):
    path, witness = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"model_state_dict": Malicious(witness)}
    if saved_by_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"evil\.pt: .* was not loaded; save only"):
        load_pytorch_weights(str(path))
    assert not witness.exists()


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding.weight": None}, r"has no matrix embedding\.weight"),
        ({"layers.1.gate_proj.bias": None}, r"layers\.1\.gate_proj\.bias missing"),
        ({"norm.weight": zeros(3)}, r"norm\.weight unexpected"),
        ({"layers.7.out_proj.bias": zeros(11)}, r"and 9 more missing"),
        ({"layers.1.value_proj.bias": zeros(13)}, r"\[13\]; expected \[7\]"),
        ({"lm_head.bias": zeros(3, dtype=np.int32)}, r"'lm_head.bias' is int32; save floating-poi"),
    ],
)
def test_other_names_shapes_or_dtypes_are_rejected(tmp_path, state, change, message):
    state = {name: x for name, x in (state | change).items() if x is not None}
    path = save_safetensors(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        load_pytorch_weights(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, r"none\.pt: no such file"),
        ("weights.npz", b"x", r"not a \.pt or \.safetensors file"),
        ("cut.safetensors", 1000, r"cut\.safetensors: cannot be read"),
        ("cut.pt", b"PK", r"cut\.pt: corrupted"),
    ],
)
def test_missing_corrupt_and_other_files_are_rejected(
    tmp_path, torch, state, name, content, message
):
    path = tmp_path / name
    if isinstance(content, int):  # bytes of a file that is cut off
        content = Path(save_safetensors(state, path)).read_bytes()[:content]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_pytorch_weights(str(path))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda torch: {"embedding.weight": 3},
        lambda torch: {"model_state_dict": [1, 2]},
        lambda torch: {"w": torch.ones(VOCAB, HIDDEN).to_sparse()},
        lambda torch: {"w": torch.ones(VOCAB, HIDDEN, device="meta")},
        lambda torch: {"w": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])},
        lambda torch: {"w": torch.ones(1, 1).expand(2**30, 2**20)},  # larger than memory
    ],
)
def test_a_pt_of_anything_else_is_rejected(tmp_path, torch, make):
    path = tmp_path / "odd.pt"
    torch.save(make(torch), path)
    with pytest.raises(UserError, match=r"^[ -~]*odd\.pt: [ -~]*$"):
        load_pytorch_weights(str(path))


def test_a_file_larger_than_memory_is_not_read(tmp_path, state, monkeypatch):
    path = save_safetensors(state, tmp_path / "w.safetensors")
    monkeypatch.setattr(devices, "host_memory", lambda: 256)
    with pytest.raises(UserError, match=r"more than half of the 256 B of memory"):
        load_pytorch_weights(path)


def test_pt_without_pytorch_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="pip install torch, or convert"):
        load_pytorch_weights(str(tmp_path / "weights.pt"))


def test_initialization_is_that_of_pytorch():
    """Uniform in 1/sqrt(fan_in) for weights and biases, a standard normal embedding."""
    config = ModelConfig(
        vocab_size=211, block="plain", num_layers=2, hidden_dim=101, key_dim=103, value_dim=107,
        num_heads=1, tie_embeddings=False,
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    embedding = np.asarray(model.embedding.embedding[...])
    assert embedding.shape == (211, 101)
    assert abs(embedding.mean()) < 0.03
    assert abs(embedding.std() - 1) < 0.03
    linears = {"head": model.head}
    for index, layer in enumerate(model.layers):
        for name in WIDTHS:
            linears[f"{index}.{name}"] = getattr(layer.mixer.cell, name)
    for name, linear in linears.items():
        kernel, bias = np.asarray(linear.kernel[...]), np.asarray(linear.bias[...])
        bound = kernel.shape[0] ** -0.5
        assert kernel.shape[0] == (107 if "out_proj" in name else 101)
        for values in (kernel, bias):
            assert 0.95 * bound < np.abs(values).max() <= bound, name
            assert abs(values.mean()) < 4 * bound / (3 * values.size) ** 0.5, name
        assert abs(kernel.std() - bound / 3**0.5) < 0.02 * bound, name
