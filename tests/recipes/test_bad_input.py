"""Whatever is wrong with the input is one line, naming it, before anything compiles."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import cli
from rlhf_jax.config.tools import GenerateConfig
from rlhf_jax.recipes import ppo, sft
from rlhf_jax.tools import generate


def rows(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path


def sft_on(data: object, run_dir: Path) -> list[object]:
    return ["sft", "--quiet", "--data", data, "--run-dir", run_dir]


def test_compilation_is_noticed(compilations):
    jax.jit(lambda x: x * 3.25 + 0.125)(np.float32(1.5)).block_until_ready()
    assert len(compilations) == 1


def test_missing_file(refused, tmp_path):
    message = refused(*sft_on(tmp_path / "no.jsonl", tmp_path / "run"))
    assert "no.jsonl" in message
    assert not (tmp_path / "run").exists()


def test_empty_file(refused, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    message = refused(*sft_on(tmp_path / "empty.jsonl", tmp_path / "run"))
    assert "empty.jsonl" in message
    assert "empty" in message.replace("empty.jsonl", "")


def test_broken_json_line_names_file_and_line(refused, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "not closed\n')
    assert f"{path}:2" in refused(*sft_on(path, tmp_path / "run"))


def test_broken_gzip(refused, tmp_path):
    path = tmp_path / "broken.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n')[:-9])
    assert "broken.jsonl.gz" in refused(*sft_on(path, tmp_path / "run"))


def test_missing_column_names_those_that_are_there(refused, stages, tmp_path):
    path = rows(tmp_path / "rows.jsonl", {"question": "1 + 1?", "answer": "2"})
    message = refused(*sft_on(path, tmp_path / "run"), "--prompt-column", "query")
    assert f"{path}:1" in message
    assert "query" in message and "question" in message


def test_long_prompts_are_counted_with_the_choices(refused, stages, tmp_path):
    message = refused(
        "ppo",
        "--quiet",
        *("--policy", stages.ppo.policy, "--reward-model", stages.ppo.reward_model),
        *("--data", stages.ppo.data, "--run-dir", tmp_path / "run"),
        *("--max-prompt-tokens", 4, "--overlong", "fail"),
    )
    assert "max_prompt_tokens=4" in message
    assert "of" in message and "drop" in message and "truncate" in message


def reward_on(data: object, stages, run_dir: Path) -> list[object]:
    model = stages.reward.model
    return ["reward", "--quiet", "--data", data, "--model", model, "--run-dir", run_dir]


def test_chosen_equal_to_rejected(refused, stages, tmp_path):
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    path = rows(tmp_path / "pairs.jsonl", good, good | {"rejected": " b"})
    message = refused(*reward_on(path, stages, tmp_path / "run"))
    assert f"{path}:2" in message and "1 of 2" in message


def copy_of(model: str | Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def edit_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | values), "utf-8")


def test_tokenizer_without_eos(refused, stages, tmp_path):
    model = copy_of(stages.reward.model, tmp_path)
    config = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    config = {name: value for name, value in config.items() if name != "eos_token"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    for extra in model.glob("special_tokens_map.json"):
        extra.unlink()
    message = refused(
        *reward_on(stages.reward.data, stages, tmp_path / "run")[:4],
        *("--model", model, "--run-dir", tmp_path / "run"),
    )
    assert "EOS" in message and str(model) in message


def generate_with(model: Path) -> list[object]:
    return ["generate", "--model", model, "--prompt", "Review of the film The Sea:"]


def test_unknown_architecture(refused, stages, tmp_path):
    model = copy_of(stages.reward.model, tmp_path)
    edit_json(model / "config.json", model_type="mamba")
    message = refused(*generate_with(model))
    assert "mamba" in message and "gpt2" in message and "llama" in message


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_wrong_tensors(refused, stages, tmp_path, fault):
    model = copy_of(stages.reward.model, tmp_path)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("ln_f.weight"))
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        name = "transformer.h.0.attn.surprise"
        tensors[name] = np.ones((2, 3), np.float32)
    else:
        tensors[name] = np.ones((7,), np.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refused(*generate_with(model))
    assert name in message
    assert fault != "misshapen" or ("(7,)" in message and "(32,)" in message)


def test_batch_size_that_does_not_divide(refused, stages, tmp_path):
    message = refused(
        "ppo",
        *("--policy", stages.ppo.policy, "--reward-model", stages.ppo.reward_model),
        *("--data", stages.ppo.data, "--run-dir", tmp_path / "run"),
        *("--batch-size", 10, "--minibatches", 4),
    )
    assert "batch-size=10" in message and "minibatches 4" in message


def test_unknown_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sft", "--data", "x", "--run-dir", "y", "--batchsize", "3"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "--batchsize" in message and "--batch-size" in message


def test_unknown_option_in_a_file(refused, tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("batch_size: 8\noptimizer:\n  learning_rat: 0.1\n")
    message = refused("sft", "--config", path)
    assert "learning_rat" in message and "'learning_rate'" in message


def test_unknown_command(refused):
    assert "did you mean 'reward'" in refused("rewards")


def test_run_directory_of_another_run(refused, stages):
    message = refused(*sft_on(stages.sft.data, Path(stages.sft.run_dir)))
    assert stages.sft.run_dir in message and "--resume" in message


def test_resume_with_another_configuration(stages):
    config = dataclasses.replace(stages.sft, resume=True, batch_size=4)
    with pytest.raises(ValueError, match="batch_size was 8 and is now 4"):
        sft.run(config)


def test_sequences_longer_than_the_model(refused, stages, tmp_path):
    message = refused(
        "ppo",
        "--quiet",
        *("--policy", stages.ppo.policy, "--reward-model", stages.ppo.reward_model),
        *("--data", stages.ppo.data, "--run-dir", tmp_path / "run"),
        *("--max-new-tokens", 500, "--batch-size", 16),
    )
    assert "max-new-tokens=500" in message and "96" in message


def test_more_devices_than_there_are(stages, tmp_path):
    config = dataclasses.replace(
        stages.ppo,
        run_dir=str(tmp_path),
        batch_size=64,
        mesh=dataclasses.replace(stages.ppo.mesh, data=16),
    )
    with pytest.raises(ValueError, match="needs 16 devices; this machine has 8"):
        ppo.run(config)


def test_tokenizers_that_differ(refused, stages, tmp_path):
    other = copy_of(stages.ppo.reward_model, tmp_path)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "a", "b"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(
        "ppo",
        "--quiet",
        *("--policy", stages.ppo.policy, "--reward-model", other),
        *("--data", stages.ppo.data, "--run-dir", tmp_path / "run"),
        *("--batch-size", 16),
    )
    assert "reward-model" in message and "tokenizer" in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", "0"),
        ("--advantages.gamma", "1.5"),
        ("--policy-loss.clip-eps", "-0.1"),
        ("--kl.coef", "-1"),
        ("--updates", "0"),
        ("--actor-optimizer.b1", "1"),
        ("--critic-optimizer.max-grad-norm", "-1"),
        ("--value-loss.clip-eps", "-1"),
    ],
)
def test_values_out_of_range(refused, flag, value, tmp_path):
    message = refused(
        *("ppo", "--policy", "p", "--reward-model", "r", "--data", "d"),
        *("--run-dir", tmp_path / "run", flag, value),
    )
    assert f"{flag.removeprefix('--')}=" in message


def test_a_missing_stop_is_no_prize(refused, tmp_path):
    # Under "replace" the penalty becomes the score: its default, +1, would be a reward.
    message = refused(
        *("ppo", "--policy", "p", "--reward-model", "r", "--data", "d"),
        *("--run-dir", tmp_path / "run", "--scores.missing-eos", "replace"),
    )
    assert "scores.missing-eos-penalty=1.0" in message


def test_a_shape_beside_a_model_is_refused(refused, stages, tmp_path):
    message = refused(
        *sft_on(stages.sft.data, tmp_path / "run"),
        *("--model", stages.reward.model, "--fresh.width", 64),
    )
    assert "fresh" in message


def test_no_room_for_a_prompt(stages):
    config = GenerateConfig(
        model=stages.ppo.policy, prompt=("Review:",), max_new_tokens=96
    )
    with pytest.raises(ValueError, match=r"max-new-tokens=96: .* at most 96 tokens"):
        generate.run(config)
