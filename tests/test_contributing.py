"""CONTRIBUTING.md names files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
SECTION = TEXT.split("## Where to look")[1].split("\n## ")[0]
PLACES = sorted(set(re.findall(r"`(\w+)`(?: and `\w+`)? in `([\w/]+\.py)`", SECTION)))
FILES = sorted(set(re.findall(r"`([\w/]+\.py)`", SECTION)))


def find(name):
    return next(p for p in (ROOT / "rlhf_jax" / name, ROOT / name) if p.exists())


@pytest.mark.parametrize("file", FILES)
def test_the_file_exists(file):
    assert find(file)


@pytest.mark.parametrize(("name", "file"), PLACES)
def test_the_file_defines_what_it_is_named_for(name, file):
    defined = set()
    for node in ast.parse(find(file).read_text("utf-8")).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                defined.add(node.name)
            case ast.Assign():
                defined |= {x.id for x in node.targets if isinstance(x, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=target)):
                defined.add(target)
    assert name in defined


def test_places_are_found_in_the_table():
    assert len(PLACES) > 20
