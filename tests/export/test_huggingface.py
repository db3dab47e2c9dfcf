"""The export for `transformers`: generation, training, tokenizers, model card, lm-eval."""

import copy
import dataclasses
import html as html_text
import json
import re

import chex
import jax
import jax.numpy as jnp
import markdown_it
import numpy as np
import optax
import pytest
import yaml
from flax import nnx
from small_data import pretrained
from small_runs import (
    HYBRID,
    MODELS,
    TOKENIZERS,
    small_config,
    trained,
    untrained_run,
    write_corpus,
)

from benchmarks.stress.fuzz import TEXT, byte_level_json
from simplernn_jax import load_model
from simplernn_jax.data.chat_template import load_template
from simplernn_jax.errors import UserError
from simplernn_jax.export.formats import (
    TrainedModel,
    compute_logits,
    find_format,
    library_tokenizer,
)
from simplernn_jax.export.huggingface import tokenizer_json
from simplernn_jax.inference import generate, generate_text
from simplernn_jax.models.pytorch_weights import model_from_weights, named_weights
from simplernn_jax.training.loop import train
from simplernn_jax.training.metrics import encode

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and its libraries
TOKENS = np.random.default_rng(0).integers(0, 256, (3, 37))
OPTIONS = {"max_new_tokens": 11, "eos_token_id": None}


@pytest.fixture(autouse=True, scope="module")
def _no_hub(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("hub"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def write(original, folder):
    folder.mkdir()
    find_format("huggingface").write(original, folder)


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval()


def load_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module", params=MODELS)
def exported(tmp_path_factory, request, _no_hub):
    original = trained(MODELS[request.param])
    folder = tmp_path_factory.mktemp(request.param) / "out"
    write(original, folder)
    return original, load(folder)


def test_logits(exported):
    original, model = exported
    expected, _ = original.model(jnp.asarray(TOKENS, jnp.int32))
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits.numpy()
    chex.assert_trees_all_close(logits, np.asarray(expected), atol=1e-4)


def test_generation_with_and_without_cache(exported):
    original, model = exported
    ids = torch.tensor(TOKENS)
    for settings in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(model.generate(ids, use_cache=use_cache, **OPTIONS, **settings))
        assert torch.equal(*found), settings
    greedy = model.generate(ids, do_sample=False, **OPTIONS)[:, 37:].tolist()
    assert greedy == generate(original.model, TOKENS, max_new_tokens=11).tokens.tolist()


def test_padding_on_the_left_changes_nothing(exported):
    _, model = exported
    ids, mask = torch.tensor(TOKENS), torch.ones(3, 37, dtype=torch.long)
    mask[0, :5], mask[1, :19] = 0, 0
    padded = ids.masked_fill(mask == 0, 258)
    together = model.generate(padded, attention_mask=mask, do_sample=False, **OPTIONS)
    for row, start in enumerate((5, 19, 0)):
        alone = model.generate(ids[row : row + 1, start:], do_sample=False, **OPTIONS)
        assert torch.equal(together[row, start:], alone[0])


def test_several_tokens_after_a_filled_cache(exported):
    _, model = exported
    ids = torch.tensor(TOKENS)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :20], use_cache=True)
        rest = model(ids[:, 20:], use_cache=True, cache=first.cache)
        cache = model(ids[:, :20], use_cache=True).cache
    chex.assert_trees_all_close(rest.logits.numpy(), whole[:, 20:].numpy(), atol=1e-5)
    other = copy.deepcopy(cache)
    expected = model.generate(ids, do_sample=False, **OPTIONS)
    assert torch.equal(model.generate(ids, do_sample=False, cache=cache, **OPTIONS), expected)
    mask = torch.ones_like(ids)
    new = {"input_ids": ids[:, 20:], "attention_mask": mask, "cache": other}
    assert torch.equal(model.generate(**new, do_sample=False, **OPTIONS), expected[:, 20:])
    with pytest.raises(ValueError, match="pass the ids of the whole sequence"):
        model.generate(ids[:, :20], cache=cache, **OPTIONS)


def test_padding_after_the_first_call_is_rejected(exported):
    _, model = exported
    ids, mask = torch.tensor(TOKENS), torch.ones(3, 37, dtype=torch.long)
    mask[1, 20:23] = 0
    cache = model(ids[:, :20], use_cache=True).cache
    with pytest.raises(ValueError, match="pad its sequences on the left"):
        model(ids[:, 20:], attention_mask=mask, cache=cache)


def test_a_resized_vocabulary(exported):
    _, model = exported
    resized = copy.deepcopy(model).to(torch.bfloat16)
    resized.resize_token_embeddings(269)
    assert resized(torch.tensor(TOKENS)).logits.shape == (3, 37, 269)


def test_loss_of_a_batch_in_several_calls_is_that_of_the_whole(exported):
    _, model = exported
    ids = torch.tensor(TOKENS)
    labels = ids.clone()
    labels[0, :20] = -100
    count = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        whole = model(ids, labels=labels).loss
        parts = [
            model(ids[n : n + 1], labels=labels[n : n + 1], num_items_in_batch=count).loss
            for n in range(3)
        ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_loss_and_gradients(exported):
    original, model = exported
    ids = torch.tensor(TOKENS)
    model.zero_grad()
    output = model.train()(ids, labels=ids)
    model.eval()
    assert output.cache is None
    output.loss.backward()
    tokens = jnp.asarray(TOKENS, jnp.int32)

    def loss_of(model):
        logits, _ = model(tokens)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return loss.mean()

    loss, gradient = nnx.jit(nnx.value_and_grad(loss_of))(original.model)
    assert output.loss.item() == pytest.approx(float(loss), abs=1e-5)
    expected = named_weights(nnx.merge(nnx.graphdef(original.model), gradient))
    found = {name: value.grad.numpy() for name, value in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        chex.assert_trees_all_close(found[name], value, atol=1e-4 * np.abs(value).max() + 1e-7)


def test_a_trained_copy_comes_back(tmp_path):
    original = trained(MODELS["parallel"])
    write(original, tmp_path / "a")
    model = load(tmp_path / "a")
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    model.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "simplernn.json").write_bytes(
        (tmp_path / "a" / "simplernn.json").read_bytes()
    )
    again, _, _ = load_model(str(tmp_path / "b"))
    weights = named_weights(original.model)
    weights["embedding.weight"] = 2 * weights["embedding.weight"]
    expected = model_from_weights(original.model.config, weights, "here")
    chex.assert_trees_all_equal(nnx.state(again, nnx.Param), nnx.state(expected, nnx.Param))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers(tmp_path, kind):
    ours = TOKENIZERS[kind]()
    write(trained(MODELS["parallel"], ours), tmp_path / "out")
    theirs = load_tokenizer(tmp_path / "out")
    library = library_tokenizer(ours)  # of the other formats
    library.encode_special_tokens = True
    for text in (TEXT, "", "a<|eos|>b", "</s>", TEXT[:1] * 300):
        if kind in ("char", "fim") and not set(text) <= set(ours.decode(range(ours.vocab_size))):
            continue
        ids = theirs(text)["input_ids"]
        assert ids == [ours.bos_id, *ours.encode(text).tolist()]
        assert theirs.decode(ids, skip_special_tokens=True) == text
        assert library.encode(text, add_special_tokens=False).ids == ids[1:]
        assert library.decode(ids[1:]) == text
    special = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert special == (ours.bos_id, ours.eos_id, ours.pad_id)
    names = ("<|fim_suffix|>", "<|fim_prefix|>", "<|fim_middle|>") if ours.fim_ids else ()
    assert theirs.convert_tokens_to_ids(names) == [*ours.fim_ids]
    assert theirs.padding_side == "left"
    assert len(theirs) == ours.vocab_size


def test_special_ids_that_are_not_supported():
    tokenizer = pretrained(byte_level_json())
    tokenizer.eos_id = tokenizer.vocab_size + 7
    with pytest.raises(UserError, match="not next in the vocabulary"):
        tokenizer_json(tokenizer)


def test_chat_template(tmp_path):
    template = (
        "\n{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    original = trained(MODELS["parallel"], template=template, workdir=str(tmp_path / "my run"))
    write(original, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "\nuser: hi\n"
    ours = original.tokenizer
    assert tokenizer(text)["input_ids"] == [ours.bos_id, *ours.encode(text).tolist()]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ours.eos_id, ord("\n")]
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_the_end_of_a_turn_is_no_text(tmp_path):
    original = trained(MODELS["parallel"], template=load_template("roles"))
    bias = original.model.head.bias
    bias[...] = bias[...].at[4].set(1e3)  # the model ends its turn at once
    write(original, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    turns = [{"role": "user", "content": "hi Ą"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    ids = inputs["input_ids"][0].tolist()
    assert ids == [original.tokenizer.bos_id, *"\x02hi Ą\x04\x03".encode()]
    output = load(tmp_path / "out").generate(**inputs, max_new_tokens=9)[0].tolist()
    assert output == [*ids, 4]
    assert tokenizer.decode(output[len(ids) :], skip_special_tokens=True) == ""
    assert tokenizer.decode([*"yo Ą\x04".encode()], skip_special_tokens=True) == "yo Ą"


def card_of(original, folder):
    """Write an export; return the metadata of its model card, and its HTML."""
    write(original, folder)
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    html = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(body)
    return yaml.safe_load(header), html


def test_what_a_model_card_states(tmp_path):
    run = tmp_path / "my <b>_run_\n"
    config = small_config(
        **HYBRID,
        source=write_corpus(tmp_path / "a|b`c`"),
        validation_fraction=0.3,
        steps=4,
        eval_every=2,
        eval_tokens=20,
    )
    result = train(config, str(run))
    other_tokens = {"step": 1, "kind": "validation", "loss": 0.5, "predictions": 3}
    (run / "metrics.jsonl").write_bytes(encode(other_tokens) + (run / "metrics.jsonl").read_bytes())
    model, tokenizer, config = load_model(str(run))
    header, html = card_of(TrainedModel(model, tokenizer, config, str(run)), tmp_path / "out")
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["simplernn", "recurrent", "gated-linear-attention"],
    }
    assert html.startswith("<h1>my &lt;b&gt;_run_</h1>")
    assert "No license was stated for the weights." in html
    settings = {"max_new_tokens": 100, "temperature": 0.0}
    (text,) = generate_text(model, tokenizer, config.train.sample_prompt, **settings)
    (sample,) = re.findall(r"<pre><code>(.*?)</code></pre>", html, re.DOTALL)
    assert html_text.unescape(sample).startswith((config.train.sample_prompt + text)[:20])
    facts = dict(re.findall(r"<td>(.*)</td>\n<td>(.*)</td>", html))
    assert facts["text"].endswith("a|b`c`")
    assert facts["steps of the training run"] == "4"
    loss = f"{result.evaluation.nats_per_token:.4f} nats per token (step 4)"
    assert facts["held-out loss"] == loss
    assert facts["held-out tokens scored"] == f"{result.evaluation.predictions:,}"


def test_a_stated_license_and_languages(tmp_path):
    original = trained(MODELS["parallel"], template=load_template("roles"))
    stated = dataclasses.replace(original, license="cc-by-4.0", languages=("en", "no"))
    header, html = card_of(stated, tmp_path / "out")
    assert header["license"] == "cc-by-4.0"
    assert header["language"] == ["en", "no"]  # not false
    assert "The license of the weights is cc-by-4.0." in html
    assert "<td>en, no</td>" in html


@pytest.mark.slow
def test_lm_eval_gives_the_scores_of_the_model(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    run = str(untrained_run(tmp_path, **HYBRID))
    model, tokenizer, config = load_model(run)
    write(TrainedModel(model, tokenizer, config, run), tmp_path / "out")
    scorer = HFLM(
        pretrained=str(tmp_path / "out"),
        trust_remote_code=True,
        add_bos_token=False,  # as lm-eval needs of all tokenizers that add it themselves
        device="cpu",
        batch_size=2,
    )
    texts = ["größer als bc", "ab", "bcd é ba"]
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)
    ]
    found = scorer.loglikelihood_rolling(requests, disable_tqdm=True)
    for text, score in zip(texts, found, strict=True):
        tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text)])
        padded = np.pad(tokens, (0, 20 - len(tokens)))  # one program for all
        logprobs = np.asarray(jax.nn.log_softmax(compute_logits(model, padded)))
        wanted = logprobs[np.arange(len(tokens) - 1), tokens[1:]].sum()
        assert score == pytest.approx(float(wanted), abs=1e-4)
