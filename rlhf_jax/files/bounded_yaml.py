"""Reads YAML that someone else wrote, under limits.

Only what options need: texts, numbers, true and false, null, lists, and mappings whose
keys are texts and occur once. No aliases, no tags.
"""

import os
from collections.abc import Callable
from typing import Any

import yaml

from rlhf_jax.files.bounded_json import MOST_DEPTH, MOST_DIGITS, check_texts
from rlhf_jax.files.printable import one_line, printable, shown
from rlhf_jax.files.regular_file import read_text

MOST_BYTES = 2**16
"""Largest file. PyYAML reads some 200,000 bytes per second."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without what makes files large, deep or ambiguous."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, f"*{event.anchor} is an alias; write out its value")
        if getattr(event, "tag", None) is not None:
            raise _refused(event, f"the tag {shown(event.tag)} is not supported")
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _refused(event, f"nested more than {MOST_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise _refused(key, "this key is no text; quote it")
            if key.value in seen:
                raise _refused(key, f"the key {shown(key.value)} occurs twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MOST_DIGITS:
            raise _refused(node, f"an integer has more than {MOST_DIGITS} digits")
        return self._number(node, super().construct_yaml_int)

    def construct_yaml_float(self, node: Any) -> float:
        return self._number(node, super().construct_yaml_float)

    def _number(self, node: Any, construct: Callable[[Any], Any]) -> Any:
        try:
            return construct(node)
        except (ValueError, OverflowError):
            raise _refused(node, f"{shown(node.value)} is not a number") from None


_NUMBERS = {"int": _Loader.construct_yaml_int, "float": _Loader.construct_yaml_float}
for _name, _construct in _NUMBERS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _construct)
# Dates, `<<` and `=` are texts.
_RESOLVED = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag in _RESOLVED]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        text: to parse.
        where: the file; begins the message of an error.

    Raises:
        ValueError: one line with the place and the problem.
    """
    try:
        value = yaml.load(text, _Loader)
        check_texts(value)
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        problem = one_line(error.problem or error.context or "")
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        place, problem = "", one_line(error)
    except RecursionError:
        place, problem = "", "nested too deeply"
    raise ValueError(f"{printable(where)}{place}: invalid YAML: {problem}")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value of a YAML file.

    Raises:
        ValueError: as `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, most_bytes=MOST_BYTES), os.fspath(path))


def _refused(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
