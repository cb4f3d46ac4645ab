"""The command `rlhf-jax`: flags and files to a configuration, and that to a run."""

import dataclasses
import difflib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from rlhf_jax.config.demos import (
    ArithmeticConfig,
    OveroptimizationConfig,
    QuickstartConfig,
)
from rlhf_jax.config.grpo import GRPOConfig, GRPOMethod
from rlhf_jax.config.grpo_presets import GRPO_PRESETS
from rlhf_jax.config.inspection import InspectConfig, ShowDataConfig
from rlhf_jax.config.ppo import PPOConfig, PPOMethod
from rlhf_jax.config.ppo_presets import PRESETS
from rlhf_jax.config.run import load_yaml, to_dict
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.config.tools import (
    AnnotateReadConfig,
    AnnotateWriteConfig,
    EvaluateConfig,
    GenerateConfig,
    MergeConfig,
    PresetsConfig,
)
from rlhf_jax.tools.preset_table import find_preset

USAGE = """\
usage: rlhf-jax COMMAND [options]

Reinforcement learning from human feedback, from a Hugging Face directory to a Hugging
Face directory.

to see it work, from nothing, in minutes:
  quickstart        all three stages on short reviews
  arithmetic        verifiable rewards: imitation, then GRPO or PPO on problems
  overoptimization  what pressing a reward model too hard does: a figure

stages, in the order in which they are used:
  sft               stage 1: a language model learns to imitate texts or answers
  annotate write    answers of a model, in a file in which people rank or rate them
  annotate read     such files, filled in, as judgements for a reward model
  reward            stage 2: a reward model learns from human preferences
  ppo               stage 3: the language model learns to be rewarded, by a critic
  grpo              stage 3 without a critic: answers to a prompt against each other

tools:
  inspect           what a model is, and the memory that training it would take
  show-data         tokens of a data set, those that a stage learns in colour
  generate          answers of a model to prompts
  evaluate          held-out figures of a language model, a policy or a reward model
  merge             an adapter and its base model as one model
  presets           how known methods set the options of ppo and grpo

`rlhf-jax COMMAND --help` explains every option. Options can also come from a YAML file:
`rlhf-jax ppo --config ppo.yaml --updates 200`; flags override the file.
"""


def sft(config: SFTConfig) -> None:
    """Runs stage 1."""
    from rlhf_jax.recipes import sft as recipe

    recipe.run(config)


def reward(config: RewardConfig) -> None:
    """Runs stage 2."""
    from rlhf_jax.recipes import reward_model as recipe

    recipe.run(config)


def ppo(config: PPOConfig) -> None:
    """Runs stage 3."""
    from rlhf_jax.recipes import ppo as recipe

    recipe.run(config)


def grpo(config: GRPOConfig) -> None:
    """Runs stage 3 without a critic."""
    from rlhf_jax.recipes import grpo as recipe

    recipe.run(config)


def generate(config: GenerateConfig) -> None:
    """Prints answers."""
    from rlhf_jax.tools import generate as recipe

    recipe.run(config)


def annotate_write(config: AnnotateWriteConfig) -> None:
    """Writes a file to fill in."""
    from rlhf_jax.tools import annotate as recipe

    recipe.write(config)


def annotate_read(config: AnnotateReadConfig) -> None:
    """Reads files that were filled in."""
    from rlhf_jax.tools import annotate as recipe

    recipe.read(config)


def show_data(config: ShowDataConfig) -> None:
    """Prints tokens."""
    from rlhf_jax.tools import show_data as recipe

    recipe.run(config)


def evaluate(config: EvaluateConfig) -> None:
    """Prints figures."""
    from rlhf_jax.tools import evaluate as recipe

    recipe.run(config)


def inspect_model(config: InspectConfig) -> None:
    """Prints what a model is and needs."""
    from rlhf_jax.tools import inspect_model as recipe

    recipe.run(config)


def merge(config: MergeConfig) -> None:
    """Writes a model with an adapter in it."""
    from rlhf_jax.tools import merge as recipe

    recipe.run(config)


def presets(config: PresetsConfig) -> None:
    """Prints presets."""
    from rlhf_jax.tools import preset_table as recipe

    recipe.run(config)


def quickstart(config: QuickstartConfig) -> None:
    """Runs everything on the embedded task."""
    from rlhf_jax.demos import quickstart as recipe

    recipe.run(config)


def arithmetic(config: ArithmeticConfig) -> None:
    """Runs imitation and reinforcement learning on problems with right answers."""
    from rlhf_jax.demos import arithmetic as recipe

    recipe.run(config)


def overoptimization(config: OveroptimizationConfig) -> None:
    """Draws proxy and true reward over √KL."""
    from rlhf_jax.demos.overoptimization import command as recipe

    recipe.run(config)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "quickstart": (QuickstartConfig, quickstart),
    "arithmetic": (ArithmeticConfig, arithmetic),
    "sft": (SFTConfig, sft),
    "annotate write": (AnnotateWriteConfig, annotate_write),
    "annotate read": (AnnotateReadConfig, annotate_read),
    "reward": (RewardConfig, reward),
    "ppo": (PPOConfig, ppo),
    "grpo": (GRPOConfig, grpo),
    "inspect": (InspectConfig, inspect_model),
    "merge": (MergeConfig, merge),
    "presets": (PresetsConfig, presets),
    "show-data": (ShowDataConfig, show_data),
    "generate": (GenerateConfig, generate),
    "evaluate": (EvaluateConfig, evaluate),
    "overoptimization": (OveroptimizationConfig, overoptimization),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; user errors end with one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    command, *flags = arguments
    if flags and f"{command} {flags[0]}" in COMMANDS:  # such as `annotate write`
        command, *flags = f"{command} {flags[0]}", *flags[1:]
    if command == "--version":
        from rlhf_jax import __version__

        print(__version__)
        return
    if command not in COMMANDS:
        halves = [name for name in COMMANDS if name.startswith(f"{command} ")]
        if halves:
            seconds = " or ".join(name.split()[1] for name in halves)
            _fail(f"{command} what? Add {seconds}: rlhf-jax {halves[0]} --help")
        _fail(f"unknown command {command!r}{_suggestion(command, COMMANDS)}")
    config_type, run = COMMANDS[command]
    from rlhf_jax.learner.finite import NonFiniteError

    try:
        flags = _with_names(command, flags)
        config = parse(config_type, flags, prog=f"rlhf-jax {command}")
        quieten_libraries()
        use_compilation_cache()
        run(config)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError, NonFiniteError) as error:
        if os.environ.get("RLHF_JAX_TRACEBACK"):
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parse(config_type: type, flags: Sequence[str], *, prog: str) -> Any:
    """A configuration from flags, and from a YAML file where `--config` names one.

    What a preset and the file say becomes flags before those given, so that the last
    one counts and one parser checks all values.

    Raises:
        ValueError: on a file that cannot be read or has keys that do not exist, or a
            preset that does not.
    """
    flags, path = _take(list(flags), "--config", "the path of a YAML file")
    values = {} if path is None else load_yaml(path)
    preset_flags = []
    presets = _presets_of(config_type)
    if presets:
        flags, name = _take(flags, "--preset", f"one of {', '.join(presets)}")
        name_in_file = values.pop("preset", None)
        name = name or name_in_file
        if name is not None:
            method = to_dict(find_preset(name, presets))
            preset_flags = flags_from(config_type, method, where=f"preset {name}")
    if path is not None:
        flags = flags_from(config_type, values, where=path) + flags
    flags = preset_flags + flags
    return tyro.cli(
        config_type,
        args=flags,
        prog=prog,
        description=f"{inspect.getdoc(config_type)}\n\n"
        "--config FILE reads options from YAML.",
    )


def _with_names(command: str, flags: list[str]) -> list[str]:
    """The flags, with the name of the one that may go without: `inspect DIRECTORY`."""
    if command == "inspect" and flags and not flags[0].startswith("-"):
        return ["--model", *flags]
    return flags


def _presets_of(config_type: type) -> Mapping[str, Callable[[], Any]]:
    if issubclass(config_type, PPOMethod):
        return PRESETS
    return GRPO_PRESETS if issubclass(config_type, GRPOMethod) else {}


def _take(flags: list[str], option: str, needs: str) -> tuple[list[str], str | None]:
    """The flags without `option VALUE` or `option=VALUE`, and the value."""
    for at, flag in enumerate(flags):
        if flag.startswith(f"{option}="):
            return flags[:at] + flags[at + 1 :], flag.removeprefix(f"{option}=")
        if flag == option:
            if at + 1 == len(flags):
                raise ValueError(f"{option} needs {needs}")
            return flags[:at] + flags[at + 2 :], flags[at + 1]
    return flags, None


def flags_from(
    config_type: type, values: Mapping[str, Any], *, where: str, prefix: str = ""
) -> list[str]:
    """Nested values as the flags that give them.

    Raises:
        ValueError: naming the file and the key, where a key does not exist.
    """
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    flags = []
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"{where}: unknown option {name!r}{_suggestion(name, fields)}"
            )
        flag = prefix + name.replace("_", "-")
        section = fields[name].type
        if dataclasses.is_dataclass(section):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {name} must be a section of options")
            assert isinstance(section, type)
            flags += flags_from(section, value, where=where, prefix=f"{flag}.")
        elif isinstance(value, bool):
            no = "" if value else "no-"
            flags.append(f"--{prefix}{no}{flag.removeprefix(prefix)}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def quieten_libraries() -> None:
    """No advice about PyTorch, which nothing here needs."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the environment says where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(home / "rlhf_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _suggestion(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _fail(message: str) -> None:
    print(f"rlhf-jax: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
