"""A temperature that cannot work is one line, before a model is looked for.

No model of these names exists: whoever looked for one first would complain of that.
"""

import pytest

POLICY = ["--policy", "p", "--data", "d", "--run-dir", "r"]
COMMANDS = {
    "evaluate": ["evaluate", "--model", "m", "--prompts", "p"],
    "generate": ["generate", "--model", "m", "--prompt", "p"],
    "annotate": ["annotate", "write", "--model", "m", "--prompt", "p"],
    "ppo": ["ppo", *POLICY, "--reward-model", "r"],
    "grpo": ["grpo", *POLICY, "--reward-model", "r"],
}


@pytest.mark.parametrize("value", ["-1.0", "nan", "inf", "1e-50"])
@pytest.mark.parametrize("command", COMMANDS)
def test_temperatures_without_a_distribution(refused, command, value):
    message = refused(*COMMANDS[command], "--temperature", value)
    assert f"error: temperature={value}: " in message


@pytest.mark.parametrize("value", ["0", "0.0", "-0.0"])
def test_greedy_answers_have_no_kl_to_a_reference(refused, value):
    message = refused(*COMMANDS["evaluate"], "--reference", "r", "--temperature", value)
    assert f"error: temperature={float(value)}: " in message
    assert "remove --reference" in message
    assert "--temperature 1" in message


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_training_learns_from_sampling(refused, command):
    assert "temperature=0" in refused(*COMMANDS[command], "--temperature", "0")


def test_greedy_answers_without_a_reference_are_measured(complaint, tmp_path):
    # It gets as far as the model.
    message = complaint(
        *("evaluate", "--model", tmp_path / "m", "--prompts", "p"),
        *("--temperature", "0"),
    )
    assert "temperature" not in message and str(tmp_path / "m") in message
