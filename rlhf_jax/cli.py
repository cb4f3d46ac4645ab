"""The command `rlhf-jax`: parses flags and files, and runs the command."""

import dataclasses
import difflib
import functools
import importlib
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
from rlhf_jax.config.ppo_presets import PPO_PRESETS
from rlhf_jax.config.run import load_yaml, to_dict
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.config.tools import (
    AnnotateReadConfig,
    AnnotateWriteConfig,
    EvaluateConfig,
    GenerateConfig,
    MergeConfig,
    PresetsConfig,
    ReplayConfig,
)
from rlhf_jax.files.printable import printable, shown
from rlhf_jax.run.terminal import escape_controls
from rlhf_jax.tools.preset_table import find_preset


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its options, a one-line summary, and the function that runs it.

    The module is imported when the command runs, so that `--help` is fast.
    """

    config: type
    summary: str
    module: str
    function: str = "run"

    def run(self, config: Any) -> None:
        """Runs the command."""
        module = importlib.import_module(f"rlhf_jax.{self.module}")
        getattr(module, self.function)(config)


GROUPS: dict[str, dict[str, Command]] = {
    "to see it work, from scratch, in minutes": {
        "quickstart": Command(
            QuickstartConfig,
            "all three stages on short reviews",
            "demos.quickstart",
        ),
        "arithmetic": Command(
            ArithmeticConfig,
            "verifiable rewards: SFT, then GRPO or PPO, on arithmetic",
            "demos.arithmetic",
        ),
        "overoptimization": Command(
            OveroptimizationConfig,
            "reward-model overoptimization, with a figure",
            "demos.overoptimization.command",
        ),
    },
    "stages, in order": {
        "sft": Command(
            SFTConfig,
            "stage 1: fine-tune a language model on texts or responses",
            "recipes.sft",
        ),
        "annotate write": Command(
            AnnotateWriteConfig,
            "sample responses into a file for people to rank or rate",
            "tools.annotate",
            "write",
        ),
        "annotate read": Command(
            AnnotateReadConfig,
            "read completed files as data for a reward model",
            "tools.annotate",
            "read",
        ),
        "reward": Command(
            RewardConfig,
            "stage 2: train a reward model on human preferences",
            "recipes.reward_model",
        ),
        "ppo": Command(
            PPOConfig,
            "stage 3: optimize the language model for a reward with PPO",
            "recipes.ppo",
        ),
        "grpo": Command(
            GRPOConfig,
            "stage 3 without a critic: GRPO and related methods",
            "recipes.grpo",
        ),
    },
    "tools": {
        "inspect": Command(
            InspectConfig,
            "describe a model and the memory needed to train it",
            "tools.inspect_model",
        ),
        "show-data": Command(
            ShowDataConfig,
            "print the tokens of a dataset, with trained tokens in color",
            "tools.show_data",
        ),
        "generate": Command(
            GenerateConfig, "sample responses to prompts", "tools.generate"
        ),
        "evaluate": Command(
            EvaluateConfig,
            "held-out metrics of a language model, policy or reward model",
            "tools.evaluate",
        ),
        "replay": Command(
            ReplayConfig,
            "run one step again that had a NaN or infinite loss",
            "tools.replay",
        ),
        "merge": Command(
            MergeConfig, "merge an adapter into its base model", "tools.merge"
        ),
        "presets": Command(
            PresetsConfig,
            "list the presets of ppo and grpo",
            "tools.preset_table",
        ),
    },
}
COMMANDS = {
    name: command for group in GROUPS.values() for name, command in group.items()
}


def usage() -> str:
    """The output of `rlhf-jax --help`."""
    lines = [
        "usage: rlhf-jax COMMAND [options]",
        "",
        "Reinforcement learning from human feedback, from a Hugging Face checkpoint to",
        "a Hugging Face checkpoint.",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<17} {x.summary}" for name, x in group.items()]
    lines += [
        "",
        "`rlhf-jax COMMAND --help` explains every option. Options can also come from a",
        "YAML file: `rlhf-jax ppo --config ppo.yaml --updates 200`; flags override it.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; the exit codes are those of docs/exit-codes.md."""
    escape_controls()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
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
            _fail(f"{command} requires {seconds}: rlhf-jax {halves[0]} --help")
        _fail(f"unknown command {command!r}{_suggestion(command, COMMANDS)}")
    _run(command, flags)


def _run(command: str, flags: list[str]) -> None:
    from rlhf_jax.learner.finite import NonFiniteError
    from rlhf_jax.run.interrupt import Interrupted, exits_by_signal

    found = COMMANDS[command]
    try:
        flags = _with_names(command, flags)
        config = parse(found.config, flags, prog=f"rlhf-jax {command}")
        quieten_libraries()
        use_compilation_cache()
        with exits_by_signal():
            found.run(config)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError, NonFiniteError) as error:
        if os.environ.get("RLHF_JAX_TRACEBACK"):
            raise
        _fail(str(error), code=3 if isinstance(error, NonFiniteError) else 2)
    except Interrupted as stopped:
        print(f"rlhf-jax: {stopped}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parse(config_type: type, flags: Sequence[str], *, prog: str) -> Any:
    """A configuration from flags, and from a YAML file given by `--config`.

    Values of a preset and the file become flags before the given ones, so the last one
    wins and one parser checks all values.

    Raises:
        ValueError: for an unreadable file, unknown keys or an unknown preset.
    """
    flags, path = _take(list(flags), "--config", "the path of a YAML file")
    values = {} if path is None else load_yaml(path)
    preset_flags = []
    presets = _presets_of(config_type)
    if presets:
        flags, name = _take(flags, "--preset", f"one of {', '.join(presets)}")
        name_in_file = values.pop("preset", None)
        if not isinstance(name_in_file, str | None):
            raise ValueError(
                f"{path}: preset is {shown(name_in_file)}: give one of "
                f"{', '.join(presets)}"
            )
        name = name or name_in_file
        if name is not None:
            method = to_dict(find_preset(name, presets))
            preset_flags = flags_from(config_type, method, where=f"preset {name}")
    if path is not None:
        flags = flags_from(config_type, values, where=path) + flags
    flags = preset_flags + flags
    described = (
        f"{inspect.getdoc(config_type)}\n\n--config FILE reads options from YAML."
    )
    from_flags = functools.partial(
        tyro.cli, config_type, prog=prog, description=described
    )
    escaped = [printable(flag) for flag in flags]
    if escaped == flags:
        return from_flags(args=flags)
    try:
        return from_flags(args=flags, console_outputs=False)
    except SystemExit:  # its complaint would quote them
        return from_flags(args=escaped)


def _with_names(command: str, flags: list[str]) -> list[str]:
    """The flags, with the name of the positional one added: `inspect DIRECTORY`."""
    if command == "inspect" and flags and not flags[0].startswith("-"):
        return ["--model", *flags]
    return flags


def _presets_of(config_type: type) -> Mapping[str, Callable[[], Any]]:
    if issubclass(config_type, PPOMethod):
        return PPO_PRESETS
    return GRPO_PRESETS if issubclass(config_type, GRPOMethod) else {}


def _take(flags: list[str], option: str, needs: str) -> tuple[list[str], str | None]:
    """Removes `option VALUE` or `option=VALUE` from flags; returns the value too."""
    for at, flag in enumerate(flags):
        if flag.startswith(f"{option}="):
            return flags[:at] + flags[at + 1 :], flag.removeprefix(f"{option}=")
        if flag == option:
            if at + 1 == len(flags):
                raise ValueError(f"{option} requires {needs}")
            return flags[:at] + flags[at + 2 :], flags[at + 1]
    return flags, None


def flags_from(
    config_type: type, values: Mapping[str, Any], *, where: str, prefix: str = ""
) -> list[str]:
    """Nested values as flags.

    Raises:
        ValueError: for an unknown key, with the file and the key.
    """
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    flags = []
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"{where}: unknown option {shown(name)}{_suggestion(name, fields)}"
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
        elif isinstance(value, list) and not any(map(_is_nested, value)):
            flags += [f"--{flag}", *map(str, value)]
        elif _is_nested(value):
            raise ValueError(
                f"{where}: {name} is {shown(value)}: give one value, or a list of some"
            )
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | Mapping)


def quieten_libraries() -> None:
    """Silences advice to install PyTorch, which is not needed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def use_compilation_cache() -> None:
    """Caches compiled programs between runs, unless the environment sets a cache."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(home / "rlhf_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _suggestion(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    names = ", ".join(known)
    return f"; known: {names}" if len(names) < 150 else "; --help lists the known ones"


def _fail(message: str, *, code: int = 2) -> None:
    print(f"rlhf-jax: error: {printable(message)}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
