"""Who may import whom, what must stay out of the code, and what an import loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_jax"

MAY_IMPORT = {
    "algo": {"jax", "chex", "rlhf_jax.algo"},
    "interfaces": {"jax", "rlhf_jax.algo"},
    "rollout": {"jax", "chex", "rlhf_jax.algo", "rlhf_jax.interfaces"},
    "learner": {"jax", "optax", "rlhf_jax.algo", "rlhf_jax.interfaces"},
    "models": {
        "jax",
        "numpy",
        "ml_dtypes",
        "flax",
        "huggingface_hub",
        "jinja2",
        "safetensors",
        "tokenizers",
        "transformers",
        "rlhf_jax.algo",
        "rlhf_jax.interfaces",
    },
    "presets": {"rlhf_jax.algo.options", "rlhf_jax.runtime.config"},
    "grpo_presets": {"rlhf_jax.algo.options", "rlhf_jax.runtime.config"},
    "tasks": {"numpy"},
    "runtime": {
        "jax",
        "numpy",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "orbax",
        "pyarrow",
        "rich",
        "tensorboardX",
        "wandb",
        "yaml",
        "rlhf_jax.algo",
        "rlhf_jax.interfaces",
    },
}
"""Third-party packages and parts of ours, besides the part itself and the standard
library. `recipes` and `cli` may import everything; nobody else imports them."""

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
"""Belong to runtime, recipes and cli (and to the file formats of models)."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


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
    if part in ("recipes", "cli", "__init__"):
        return
    allowed = MAY_IMPORT[part] | {f"rlhf_jax.{part}"}
    for module in imported_modules(path):
        if module.split(".")[0] in sys.stdlib_module_names:
            continue
        assert any(
            module == name or module.startswith(f"{name}.") for name in allowed
        ), f"{path.name} imports {module}, which {part} may not"


def test_every_part_is_in_the_table():
    parts = {part_of(path) for path in MODULES}
    assert parts - set(MAY_IMPORT) == {"recipes", "cli", "__init__"}


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
