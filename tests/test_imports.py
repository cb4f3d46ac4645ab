"""Who may import whom, what must stay out of the code, and what an import loads."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_jax"

MAY_IMPORT = {
    "files": {"yaml"},
    "algo": {"jax", "chex"},
    "interfaces": {"jax", "algo"},
    "rollout": {"jax", "chex", "algo", "interfaces"},
    "learner": {"jax", "optax", "algo", "interfaces"},
    "models": {
        *("jax", "numpy", "ml_dtypes", "flax", "huggingface_hub", "jinja2"),
        *("safetensors", "tokenizers", "transformers"),
        *("files", "algo", "interfaces"),
    },
    "tasks": {"numpy"},
    "data": {"jax", "numpy", "pyarrow", "transformers", "files", "algo", "models"},
    "config": {
        *("yaml", "algo.options", "algo.scores", "algo.temperature"),
        *("files", "data", "tasks"),
    },
    "run": {
        *("jax", "numpy", "filelock", "jinja2", "markupsafe", "matplotlib", "orbax"),
        *("rich", "tensorboardX", "wandb", "yaml"),
        *("algo", "interfaces", "files", "config", "learner", "models.hf"),
    },
    "rewards": {
        *("jax", "numpy"),
        *("files", "algo", "config", "data", "models", "run"),
    },
    "recipes": {
        *("jax", "numpy", "flax", "optax"),
        *("algo", "interfaces", "rollout", "learner", "models", "data", "config"),
        *("run", "rewards", "files"),
    },
    "tools": {
        *("jax", "numpy", "flax", "jinja2", "markupsafe", "rich", "yaml"),
        *("algo", "interfaces", "rollout", "learner", "models", "data", "config"),
        *("run", "rewards", "recipes", "files"),
    },
    "demos": {
        *("jax", "numpy", "matplotlib", "rich", "yaml"),
        *("algo", "rollout", "learner", "models", "data", "config", "run", "rewards"),
        *("recipes", "tasks", "files"),
    },
}
"""Third-party packages and other parts of ours, besides the standard library. `cli` may
import everything, and nobody imports it."""

FORBIDDEN = {
    r"\bpmap\b": "jit with NamedSharding",
    r"jax\._src|jax\.core\b": "private to JAX",
    r"chex\.dataclass": "unequal mappable ones pass assert_array_equal",
    r"jnp\.f(min|max)\b": "they swallow NaN",
    r"jnp\.empty": "uninitialised since jax 0.11",
    r"\* *mask\b|\bmask *\*(?!\*)": "NaN · 0 is NaN: select with jnp.where",
    r"getattr\(config": "options are fields, a misspelt one must fail",
}

HOST_ONLY = {
    r"\bprint\(": "printing",
    r"(?<![\w.])open\(": "files",
    r"\bos\.environ\b": "the environment",
    r"\bjax\.devices\(": "devices",
    r"\bjax\.device_get\(": "transfers",
    r"\bjax\.config\b": "global configuration",
    r"\bimport (time|logging)\b": "clock and log",
}
"""Belong to the parts above (and to the file formats of models)."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@functools.cache
def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def names(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_imports_follow_the_table(path):
    part = part_of(path)
    if part in ("cli", "__init__"):
        return
    allowed = MAY_IMPORT[part] | {part}
    for module in imported_modules(path):
        module = module.removeprefix("rlhf_jax.")
        if module.split(".")[0] in sys.stdlib_module_names:
            continue
        assert any(
            module == name or module.startswith(f"{name}.") for name in allowed
        ), f"{path.name} imports {module}, which {part} may not"


def test_every_part_is_in_the_table():
    parts = {part_of(path) for path in MODULES}
    assert parts - set(MAY_IMPORT) == {"cli", "__init__"}


def test_no_part_imports_one_that_imports_it():
    """Parts stand above each other: each can be read without those above it."""
    above = {
        part: {name.split(".")[0] for name in allowed} & set(MAY_IMPORT)
        for part, allowed in MAY_IMPORT.items()
    }
    while above:  # take away the parts that stand on nothing that is left
        lowest = {part for part, below in above.items() if not below & set(above)}
        assert lowest, f"a circle among {sorted(above)}"
        above = {part: below for part, below in above.items() if part not in lowest}


STAGES = {"sft", "reward_model", "ppo", "grpo"}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_import_each_other(stage):
    modules = imported_modules(PACKAGE / "recipes" / f"{stage}.py")
    others = {f"rlhf_jax.recipes.{name}" for name in STAGES - {stage}}
    assert not modules & others


def test_every_file_has_a_name_of_its_own():
    """One is found by its name; a stage's options are called as the stage is."""
    found = [path.name for path in MODULES if path.name != "__init__.py"]
    twice = {name for name in found if found.count(name) > 1}
    assert twice == {"ppo.py", "grpo.py"}
    for name in twice:
        assert (PACKAGE / "config" / name).exists()
        assert (PACKAGE / "recipes" / name).exists()


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_no_module_imports_in_a_circle(path):
    """Followed over the whole package, at the top of the files."""
    seen, left = set(), [path]
    while left:
        for module in imported_modules(left.pop()):
            parts = module.removeprefix("rlhf_jax").strip(".").split(".")
            file = PACKAGE.joinpath(*parts).with_suffix(".py")
            if module.startswith("rlhf_jax.") and file.exists() and file not in seen:
                seen.add(file)
                left.append(file)
    assert path not in seen


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_forbidden_constructs_stay_out(path):
    text = path.read_text(encoding="utf-8")
    code = "\n".join(line.split("  # ")[0] for line in text.splitlines())
    code = re.sub(r'"""(?:.|\n)*?"""', "", code)
    found = [why for pattern, why in FORBIDDEN.items() if re.search(pattern, code)]
    assert found == []


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if part_of(p) in ("algo", "interfaces", "rollout", "learner")],
    ids=names,
)
def test_pure_parts_touch_nothing_outside(path):
    text = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text(encoding="utf-8"))
    found = [what for pattern, what in HOST_ONLY.items() if re.search(pattern, text)]
    assert found == []


def test_top_level_exports_algo_and_loads_nothing_heavier():
    script = (
        "import sys, jax, chex; before = set(sys.modules); import rlhf_jax; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "['rlhf_jax']"


def test_help_starts_without_loading_networks():
    script = (
        "import sys; from rlhf_jax import cli; cli.main([]); "
        "print([m for m in ('flax', 'optax', 'orbax', 'transformers') "
        "if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert output.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_files_are_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
