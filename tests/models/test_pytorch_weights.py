"""Weights of the PyTorch project, against its model in PyTorch (`benchmarks.torch_loop`).

What needs PyTorch itself asks for the fixture `torch` and is skipped where it is not installed.
"""

import io
import pickle
import random
import sys
import zipfile
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


def test_weights_are_assigned_by_name(tmp_path, state):
    model = load_pytorch_weights(save_safetensors(state, tmp_path / "w.safetensors"))
    out_proj = model.layers[1].mixer.cell.out_proj
    chex.assert_trees_all_equal(
        np.asarray(out_proj.kernel[...]), state["layers.1.out_proj.weight"].T
    )
    chex.assert_trees_all_equal(np.asarray(out_proj.bias[...]), state["layers.1.out_proj.bias"])
    chex.assert_trees_all_equal(
        np.asarray(model.embedding.embedding[...]), state["embedding.weight"]
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


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "embedding.weight"), r"embedding\.weight is missing"),
        (lambda s: without(s, "layers.1.gate_proj.bias"), r"layers\.1\.gate_proj\.bias missing"),
        (lambda s: s | {"norm.weight": zeros(3)}, r"norm\.weight unexpected"),
        (lambda s: s | {"layers.7.out_proj.bias": zeros(11)}, r"and 9 more missing"),
        (lambda s: s | {"layers.1.value_proj.bias": zeros(13)}, r"\[13\]; expected \[7\]"),
        (lambda s: s | {"embedding.weight": zeros(3)}, r"shape \[3\]; expected 2 dimensions"),
        (
            lambda s: s | {f"layers.{number}.x": zeros(1) for number in range(1025)},
            r"config\.model\.num_layers=1025 is invalid: expected at most 1024",
        ),
        (
            lambda s: s | {"lm_head.bias": zeros(3, dtype=np.int32)},
            r"'lm_head.bias' is int32; save floating-point",
        ),
    ],
)
def test_other_names_shapes_or_dtypes_are_refused(tmp_path, state, change, message):
    path = save_safetensors(change(state), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        load_pytorch_weights(path)


FLOAT8 = b'{"w":{"dtype":"F8_E5M2","shape":[3],"data_offsets":[0,3]}}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, r"none\.pt: no such file"),
        ("weights.npz", b"x", r"not a \.pt or \.safetensors file"),
        ("cut.safetensors", 0, r"cut\.safetensors: cannot be read"),
        ("cut.safetensors", 1000, r"cut\.safetensors: cannot be read"),
        (
            "float8.safetensors",
            len(FLOAT8).to_bytes(8, "little") + FLOAT8 + bytes(3),
            "cannot be read .*F8_E5M2",
        ),
    ],
)
def test_missing_damaged_and_other_files_are_refused(tmp_path, state, name, content, message):
    path = tmp_path / name
    if isinstance(content, int):  # bytes of a file that is cut off
        content = Path(save_safetensors(state, path)).read_bytes()[:content]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_pytorch_weights(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"embedding.weight": 3}, r"'embedding\.weight' is not a tensor"),
        ([1, 2], "holds no state dict"),
        ({"model_state_dict": [1, 2]}, "holds no state dict"),
    ],
)
def test_pt_without_tensors_is_refused(tmp_path, torch, content, message):
    torch.save(content, tmp_path / "numbers.pt")
    with pytest.raises(UserError, match=message):
        load_pytorch_weights(str(tmp_path / "numbers.pt"))


@pytest.mark.parametrize("size", [0, 1000])
def test_damaged_pt_is_refused(tmp_path, torch, reference, size):
    path = tmp_path / "cut.pt"
    torch.save(reference.state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"cut\.pt: "):
        load_pytorch_weights(str(path))


@pytest.fixture
def small_state(torch: Any, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tensors of a model of one layer."""
    return {n: torch.ones(array.shape) for n, array in state.items() if "layers.1" not in n}


def with_damaged_pickle(content: bytes, draw: random.Random) -> bytes:
    """A valid zip of a damaged pickle."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            part = bytearray(source.read(name))
            if name.endswith("data.pkl"):
                for _ in range(draw.randint(1, 3)):
                    part[draw.randrange(len(part))] = draw.randrange(256)
            archive.writestr(name, bytes(part))
    return target.getvalue()


def damaged(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5 and content.startswith(b"PK"):
        return with_damaged_pickle(content, draw)
    start = draw.randrange(len(content))
    end = draw.choice([start, start + 1, start + 40, len(content)])
    return content[:start] + draw.randbytes(draw.choice([0, 1, 20])) + content[end:]


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_damaged_pt_is_one_line_or_harmless(tmp_path, torch, small_state, as_zip):
    path = tmp_path / "damaged.pt"
    torch.save(small_state, path, _use_new_zipfile_serialization=as_zip)
    whole, draw = path.read_bytes(), random.Random(0)
    messages = []
    for _ in range(60):
        path.write_bytes(damaged(whole, draw))
        # The damage may be outside the weights, or a value in the old format.
        try:
            load_pytorch_weights(str(path))
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert all(map(str.isprintable, messages))


def test_a_flipped_bit_of_a_weight_is_refused(tmp_path, torch):
    path = tmp_path / "flipped.pt"
    torch.save({"embedding.weight": torch.full((VOCAB, HIDDEN), 3.25)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(np.full(9, 3.25, np.float32).tobytes())] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="wrong checksum of 'flipped/data/0'"):
        load_pytorch_weights(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch: torch.ones(VOCAB, HIDDEN).to_sparse(), "sparse_coo"),
        (lambda torch: torch.ones(VOCAB, HIDDEN).to_sparse_csr(), "sparse_csr"),
        (lambda torch: torch.ones(VOCAB, HIDDEN).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda torch: torch.ones(VOCAB, HIDDEN, dtype=torch.complex64), "complex64"),
        (lambda torch: torch.ones(VOCAB, HIDDEN, dtype=torch.int8), "int8"),
        (lambda torch: torch.ones(VOCAB, HIDDEN, device="meta"), "is meta"),
        (
            lambda torch: torch.quantize_per_tensor(torch.ones(9, 9), 0.1, 0, torch.qint8),
            "qint8|holds more than tensors",
        ),
        (lambda torch: torch.nested.nested_tensor([torch.ones(3, 2)] * 2), "is nested; save dense"),
        (lambda torch: torch.ones(VOCAB, 0), "expected 2 dimensions"),
        (lambda torch: torch.ones(0, HIDDEN), "expected 2 dimensions"),
        (lambda torch: torch.ones(()), "expected 2 dimensions"),
        (lambda torch: torch.ones(1, 1).expand(2**30, 2**20), "more than half of the"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:Sparse (CSR|invariant)",
    "ignore:.*quantize",
    "ignore:Sparse invariant checks",
    "ignore:.*nested tensors",
)
def test_odd_tensors_are_refused(tmp_path, torch, small_state, make, message):
    path = tmp_path / "odd.pt"
    torch.save(small_state | {"embedding.weight": make(torch)}, path)
    with pytest.raises(UserError, match=message):
        load_pytorch_weights(str(path))


def test_parameters_and_nan_are_accepted(tmp_path, torch, small_state):
    bias = torch.nn.Parameter(torch.full((VOCAB,), torch.nan))
    torch.save(small_state | {"lm_head.bias": bias}, tmp_path / "odd.pt")
    model = load_pytorch_weights(str(tmp_path / "odd.pt"))
    assert np.isnan(model.head.bias[...]).all()


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
