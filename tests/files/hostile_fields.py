"""Files of fields that attack whoever reads them: name → contents.

Each must be refused in one line. `BIG` stands where a value is out of all proportion.
"""

import json

DEEP = "[" * 200_000
BIG = 10**9

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 258,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 258,
    "max_position_embeddings": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NO_JSON = {
    "nothing": "",
    "text": "hello",
    "cut off": '{"a": ',
    "deep lists": DEEP,
    "deep objects": '{"a":' * 200_000,
    "deep but closed": "[" * 200_000 + "]" * 200_000,
    "depth 101": '{"a":' * 101 + "1" + "}" * 101,
    "a list": "[1, 2]",
    "a number": "3",
    "a long text": '"' + "x" * 1_000_000 + '"',
    "null": "null",
    "key twice": '{"model_type": "gpt2", "model_type": "llama"}',
    "5000 digits": '{"vocab_size": ' + "9" * 5000 + "}",
    "41 digits": '{"vocab_size": ' + "9" * 41 + "}",
    "NaN": '{"vocab_size": NaN}',
    "Infinity": '{"vocab_size": -Infinity}',
    "1e999": '{"vocab_size": 1e999}',
    "half a character": '{"model_type": "\\ud800"}',
    "latin-1": '{"model_type": "\xe9"}'.encode("latin-1"),
    "UTF-16": '{"model_type": "gpt2"}'.encode("utf-16"),
    "control character": '{"model_type": "\x1b[31m"}',
    "byte order mark": '\ufeff{"model_type": "gpt2"}',
    "5 MB": '{"a": "' + "x" * 5_000_000 + '"}',
    "a million lists": "[" + "[]," * 1_000_000 + "[]]",
    "zeros": b"\0" * 1000,
}


def changed(fields: dict, **values: object) -> str:
    return json.dumps(fields | values)


CONFIGS = {name: text for name, text in NO_JSON.items()} | {
    "no model type": "{}",
    "model type a list": changed(GPT2, model_type=["gpt2"]),
    "model type an escape": changed(GPT2, model_type="\x1b[2J\u202e"),
    "model type long": changed(GPT2, model_type="x" * 1_000_000),
    "quantized": changed(GPT2, quantization_config={"a": ["b"] * 10_000}),
    "heads that do not divide": changed(GPT2, n_head=5),
    "activation a list": changed(GPT2, activation_function=["gelu"]),
    "activation an object": changed(LLAMA, hidden_act={"a": 1}),
    "tied 1": changed(GPT2, tie_word_embeddings=1),
    "epsilon a text": changed(GPT2, layer_norm_epsilon="1e-5"),
    "epsilon 0": changed(LLAMA, rms_norm_eps=0),
    "epsilon negative": changed(LLAMA, rms_norm_eps=-1e-5),
    "epsilon 1e308": changed(LLAMA, rms_norm_eps=1e308),
    "theta 1e308": changed(LLAMA, rope_theta=1e308),
    "theta true": changed(LLAMA, rope_theta=True),
    "rope a list": changed(LLAMA, rope_scaling=[1]),
    "rope a text": changed(LLAMA, rope_parameters="linear"),
    "rope type a list": changed(LLAMA, rope_scaling={"rope_type": ["linear"]}),
    "rope type an object": changed(LLAMA, rope_scaling={"type": {}}),
    "rope factor inf": '{"rope_scaling": {"type": "linear", "factor": 1e400}}',
    "rope factor a list": changed(LLAMA, rope_scaling={"type": "linear", "factor": []}),
    "longrope of length 1": changed(
        LLAMA,
        rope_scaling={
            "type": "longrope",
            "original_max_position_embeddings": 1,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
        },
    ),
    "longrope with few factors": changed(
        LLAMA,
        rope_scaling={"type": "longrope", "short_factor": [1], "long_factor": [1]},
    ),
    "layer types nested": changed(
        LLAMA | {"model_type": "gemma2"}, layer_types=[["full_attention"]] * 2
    ),
    "layer types a text": changed(
        LLAMA | {"model_type": "gemma2"}, layer_types="full_attention"
    ),
    "gemma's two ropes": changed(
        LLAMA | {"model_type": "gemma3_text"},
        rope_parameters={"full_attention": [1]},
    ),
}
for _field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
    CONFIGS |= {
        f"{_field} {name}": changed(GPT2, **{_field: value})
        for name, value in {
            "a text": "3",
            "a list": [2],
            "an object": {},
            "true": True,
            "half": 2.5,
            "negative": -1,
            "null": None,
            "2 ** 62": 2**62,
        }.items()
    }
for _field in ("num_hidden_layers", "intermediate_size", "num_key_value_heads"):
    CONFIGS |= {
        f"{_field} {name}": changed(LLAMA, **{_field: value})
        for name, value in {"BIG": BIG, "a million": 10**6 + 1, "0": 0}.items()
        if not (_field == "intermediate_size" and value == 10**6 + 1)
    }
CONFIGS |= {
    "layers of gemma BIG": changed(
        LLAMA | {"model_type": "gemma2"}, num_hidden_layers=BIG
    ),
    "layers of qwen BIG": changed(
        LLAMA | {"model_type": "qwen2"}, num_hidden_layers=BIG
    ),
}

GENERATION = {name: text for name, text in NO_JSON.items()} | {
    "eos a text": '{"eos_token_id": "x"}',
    "eos nested": '{"eos_token_id": [[1]]}',
    "eos negative": '{"eos_token_id": -1}',
    "eos true": '{"eos_token_id": true}',
    "eos half": '{"eos_token_id": 1.5}',
    "eos 2 ** 80": '{"eos_token_id": 1208925819614629174706176}',
    "eos an object": '{"eos_token_id": {"a": 1}}',
}

ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "",
    "r": 2,
    "lora_alpha": 4,
}
ADAPTERS = {name: text for name, text in NO_JSON.items()} | {
    f"{field} {name}": changed(ADAPTER, **{field: value})
    for field, values in {
        "r": {"0": 0, "-1": -1, "a text": "2", "half": 2.5, "BIG": BIG, "true": True},
        "lora_alpha": {
            **{"0": 0, "-1": -1, "1e308": 1e308, "a text": "4", "null": None},
            **{"a list": [4], "true": True, "1e-300": 1e-300},
        },
        "alpha_pattern": {
            **{"a list": [1], "alpha 0": {"q_proj": 0}, "alpha text": {"q": "4"}},
            **{"alpha 1e308": {"q_proj": 1e308}, "alpha true": {"q_proj": True}},
            "backtracks": {"(a+)+$": 1},
            "backtracks twice": {"(.*)*x": 1},
            "many wildcards": {".*.*.*.*.*x": 1},
            "alternatives": {"(a|a)*b": 1},
            "not an expression": {"*q": 1},
            "long": {"a" * 1000: 1},
            "escape": {"\x1b[2J": 1},
            "empty": {"": 1},
            "hundred wildcards": {rf"layers\.{i}\..*": 1 for i in range(100)},
        },
        "rank_pattern": {"a text": "x", "rank 0": {"q": 0}, "rank half": {"q": 0.5}},
        "lora_dropout": {"1": 1, "negative": -0.1, "a text": "0.1"},
        "use_rslora": {"a text": "yes", "1": 1},
        "peft_type": {"a list": ["LORA"], "IA3": "IA3", "null": None},
        "task_type": {"a list": [1]},
        "bias": {"all": "all"},
        "use_dora": {"true": True},
        "modules_to_save": {"a text": "score", "nested": [["score"]], "other": ["x"]},
        "base_model_name_or_path": {"a list": ["x"], "long": "x" * 100_000},
        "revision": {"a number": 1},
    }.items()
    for name, value in values.items()
}

INDEXES = {name: text for name, text in NO_JSON.items()} | {
    name: json.dumps({"weight_map": files})
    for name, files in {
        "a list": ["model.safetensors"],
        "empty": {},
        "null": None,
        "a number": {"x": 1},
        "nested": {"x": ["a.safetensors"]},
        "parent": {"x": "../model.safetensors"},
        "absolute": {"x": "/etc/passwd"},
        "absolute tensors": {"x": "/tmp/model.safetensors"},
        "pickle": {"x": "model.bin"},
        "no such file": {"x": "none.safetensors"},
        "empty name": {"x": ""},
        "dots": {"x": ".."},
        "escape": {"x": "\x1b[2J.safetensors"},
        "zero byte": {"x": "a\0b.safetensors"},
        "long": {"x": "a" * 100_000 + ".safetensors"},
    }.items()
}
