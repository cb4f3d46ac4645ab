"""What a checkpoint from somewhere may try, and what is refused before it is read."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import load_pretrained, load_tokenizer, save_pretrained
from rlhf_jax.models.tiny import byte_tokenizer, tiny_llama

INDEX = "model.safetensors.index.json"


def test_code_in_a_checkpoint_never_runs(tmp_path, capsys):
    save_pretrained(tmp_path, *tiny_llama(), tokenizer=byte_tokenizer())
    trap = "raise SystemExit('the code of the checkpoint was run')\n"
    for name in ("modeling_trap.py", "configuration_trap.py", "tokenization_trap.py"):
        (tmp_path / name).write_text(trap)
    for file, classes in {
        "config.json": {
            "AutoConfig": "configuration_trap.TrapConfig",
            "AutoModelForCausalLM": "modeling_trap.Trap",
        },
        "tokenizer_config.json": {
            "AutoTokenizer": ["tokenization_trap.Trap", "tokenization_trap.Trap"]
        },
    }.items():
        fields = json.loads((tmp_path / file).read_text())
        fields |= {"auto_map": classes, "trust_remote_code": True}
        (tmp_path / file).write_text(json.dumps(fields))
    module, _ = load_pretrained(tmp_path)
    assert module.config.num_layers == 2
    assert load_tokenizer(tmp_path).get_vocab() == byte_tokenizer().get_vocab()
    # Without a class that transformers has, there is only the checkpoint's own.
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del fields["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"no tokenizer that can be loaded: .*code"):
        load_tokenizer(tmp_path)
    assert "[y/N]" not in capsys.readouterr().out


def test_a_model_that_only_its_own_code_knows_is_refused(tmp_path):
    save_pretrained(tmp_path, *tiny_llama())
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"model_type": "trap", "auto_map": {"AutoConfig": "modeling_trap.Trap"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match='model_type="trap"'):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/model.safetensors", "model.bin"]
)
def test_an_index_names_files_beside_it(name, tmp_path):
    save_pretrained(tmp_path, *tiny_llama(), max_shard_bytes=30_000)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f'names the file "{name}"'):
        load_pretrained(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    save_pretrained(tmp_path, *tiny_llama(), max_shard_bytes=30_000)
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    twice = {"model.embed_tokens.weight": np.zeros((258, 32), np.float32)}
    assert twice.keys() <= load_file(first).keys()
    save_file(load_file(second) | twice, second)
    with pytest.raises(ValueError, match=rf"stored twice, in .*{first.name}.*keep"):
        load_pretrained(tmp_path)


def test_a_truncated_file(tmp_path):
    save_pretrained(tmp_path / "model", *tiny_llama())
    file = tmp_path / "model" / "model.safetensors"
    for size in (file.stat().st_size - 1, 100, 4, 0):
        cut = tmp_path / "cut"
        shutil.copytree(tmp_path / "model", cut, dirs_exist_ok=True)
        (cut / file.name).write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match="cannot be read"):
            load_pretrained(cut)
