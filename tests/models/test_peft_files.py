"""PEFT as oracle of adapters: its files read here, ours read there, both in one run."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.models import load_pretrained, save_pretrained
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.hf.peft_files import read_adapter, write_adapter
from rlhf_jax.models.lora import LoraOptions, attach, init_adapters, linear_layers
from rlhf_jax.models.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # whole modules, float32
LENGTH = 16
# What PEFT calls of transformers is deprecated there.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore::UserWarning"
)


def load(name):
    """A module of the benchmarks, which are scripts beside each other."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


_ALL = load("family_cases").CASES
# One model of each family, the first of its cases.
CASES = {case.family: case for case in reversed(_ALL.values())}


def test_every_family_has_a_case():
    assert set(CASES) == set(FAMILIES)


def random_model(auto_class, family):
    torch.manual_seed(0)
    config = CASES[family].make()
    config._attn_implementation = "eager"
    model = auto_class.from_config(config).eval()
    scramble(model.parameters())
    return model


def scramble(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.15)


def rows():
    tokens = np.random.default_rng(3).integers(2, 40, (2, LENGTH)).astype(np.int32)
    return tokens, np.ones_like(tokens, dtype=bool)


def their_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows()[0]).long()).logits.numpy()


def trained_adapters(params, options, seed=1):
    """As after training: B is not zero."""
    trained = init_adapters(jax.random.key(seed), params, options)
    leaves, structure = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return jax.tree.unflatten(
        structure, [x + 0.15 * jax.random.normal(k, x.shape) for x, k in pairs]
    )


def adapt_theirs(model, **options):
    fields = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | options
    fields = {"task_type": "CAUSAL_LM"} | fields
    adapted = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
    scramble(p for n, p in adapted.named_parameters() if "lora_" in n)
    return adapted


def base_of(family, directory, auto=transformers.AutoModelForCausalLM):
    theirs = random_model(auto, family)
    theirs.save_pretrained(directory / "base")
    return theirs


@pytest.mark.parametrize("family", CASES)
def test_they_read_ours(family, tmp_path, run):
    theirs = base_of(family, tmp_path)
    module, params = load_pretrained(tmp_path / "base")
    options = LoraOptions(rank=3, alpha=7)
    trained = trained_adapters(params, options)
    write_adapter(tmp_path / "adapter", module, trained, options, base="base")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    num_modules = sum("lora_A" in name for name, _ in adapted.named_parameters())
    on_disk = peft.load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    assert num_modules == len(on_disk) // 2
    ours = run(module, attach(params, trained, options), *rows())
    np.testing.assert_allclose(ours, their_logits(adapted), **TOLERANCE)
    plain = run(module, params, *rows())
    assert np.abs(plain - ours).max() > 0.1  # the adapters matter


@pytest.mark.parametrize("family", CASES)
def test_ours_reads_theirs(family, tmp_path, run):
    adapted = adapt_theirs(base_of(family, tmp_path))
    adapted.save_pretrained(tmp_path / "adapter")
    module, params = load_pretrained(tmp_path / "base")
    trained, options = read_adapter(tmp_path / "adapter", module)
    assert set(trained["layers"]) == set(linear_layers(params))
    ours = run(module, attach(params, trained, options), *rows())
    np.testing.assert_allclose(ours, their_logits(adapted), **TOLERANCE)


THEIR_OPTIONS = {
    "rslora": {"use_rslora": True},
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.[12]\..*(q|up)_proj"},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"q_proj": 3, r"layers\.0\.mlp\..*": 20},
    },
    "some layers": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
    },
}


@pytest.mark.parametrize("name", THEIR_OPTIONS)
def test_options_of_theirs(name, tmp_path, run):
    adapted = adapt_theirs(base_of("llama", tmp_path), **THEIR_OPTIONS[name])
    adapted.save_pretrained(tmp_path / "adapter")
    module, params = load_pretrained(tmp_path / "base")
    trained, options = read_adapter(tmp_path / "adapter", module)
    ours = run(module, attach(params, trained, options), *rows())
    np.testing.assert_allclose(ours, their_logits(adapted), **TOLERANCE)
    assert np.abs(run(module, params, *rows()) - ours).max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_classifiers_both_ways(family, tmp_path, run):
    auto = transformers.AutoModelForSequenceClassification
    theirs = base_of(family, tmp_path, auto)
    module, params = load_pretrained(tmp_path / "base", head="reward")
    options = LoraOptions(rank=3, alpha=7, rslora=True)
    trained = trained_adapters(params, options)
    write_adapter(tmp_path / "ours", module, trained, options, base="base")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    ours = run(module, attach(params, trained, options), *rows())
    np.testing.assert_allclose(ours, their_logits(adapted)[:, 0], **TOLERANCE)

    scramble(p for n, p in adapted.named_parameters() if "lora_" in n or "score" in n)
    adapted.save_pretrained(tmp_path / "theirs")
    again, read = read_adapter(tmp_path / "theirs", module)
    ours = run(module, attach(params, again, read), *rows())
    np.testing.assert_allclose(ours, their_logits(adapted)[:, 0], **TOLERANCE)


@pytest.mark.parametrize("targets", [("*",), ("query", "value"), ("output",)])
@pytest.mark.parametrize("trained_b", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_our_round_trip_is_exact(family, targets, trained_b, tmp_path):
    base_of(family, tmp_path)
    module, params = load_pretrained(tmp_path / "base")
    options = LoraOptions(rank=3, alpha=7, targets=targets, rslora=True)
    if trained_b:
        trained = trained_adapters(params, options)
    else:
        trained = init_adapters(jax.random.key(1), params, options)
    write_adapter(tmp_path / "adapter", module, trained, options, base="base")
    again, read = read_adapter(tmp_path / "adapter", module)
    assert read.scale == pytest.approx(options.scale, rel=1e-12)
    if not trained_b and targets == ("query", "value"):
        return  # all B are zero: nothing says which two of the three were adapted
    assert read.rank == 3 and read.rslora
    assert jax.tree.structure(again) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, again, trained)


REFUSED = {
    "peft_type": "IA3",
    "task_type": "SEQ_2_SEQ_LM",
    "use_dora": True,
    "bias": "all",
    "init_lora_weights": "pissa",
    "modules_to_save": ["embed_tokens"],
    "megatron_config": {"a": 1},
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["a"],
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    module, params = tiny_llama()
    options = LoraOptions(rank=2)
    trained = init_adapters(jax.random.key(0), params, options)
    write_adapter(path, module, trained, options, base="b", tokenizer=byte_tokenizer())
    return path, module


def edited(adapter, tmp_path, **fields):
    path, _ = adapter
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return tmp_path


@pytest.mark.parametrize("field", REFUSED)
def test_more_than_plain_lora_is_refused(field, adapter, tmp_path):
    path = edited(adapter, tmp_path, **{field: REFUSED[field]})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {field}="):
        read_adapter(path, adapter[1])


def test_another_model_is_refused(adapter):
    module, _ = tiny_gpt2()
    with pytest.raises(ValueError, match=r"lora_[AB].* matches no linear layer"):
        read_adapter(adapter[0], module)


def test_another_size_is_refused(adapter, tmp_path):
    module, params = tiny_llama()
    options = LoraOptions(rank=2)
    trained = init_adapters(jax.random.key(0), params, options)
    pair = trained["layers"]["up"]
    trained["layers"]["up"] = pair | {"lora_b": pair["lora_b"][:, :, :7]}
    write_adapter(tmp_path, module, trained, options, base="b")
    with pytest.raises(ValueError, match=r"up_proj has A \(2, 32\) and B \(7, 2\)"):
        read_adapter(tmp_path, module)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json: no such file"):
        read_adapter(tmp_path / "no", tiny_llama()[0])


def test_adapters_and_a_saved_base_make_their_model(tmp_path, run):
    """Our own files alone, through their loader of both."""
    module, params = tiny_llama(vocab_size=40)
    save_pretrained(tmp_path / "base", module, params, tokenizer=byte_tokenizer())
    options = LoraOptions(rank=2, targets=("query", "d*"))
    trained = trained_adapters(params, options)
    base = str(tmp_path / "base")
    write_adapter(tmp_path / "adapter", module, trained, options, base=base)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ours = run(module, attach(params, trained, options), *rows())
    np.testing.assert_allclose(ours, their_logits(theirs), **TOLERANCE)
