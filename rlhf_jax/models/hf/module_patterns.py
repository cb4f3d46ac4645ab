"""Values by module name, as PEFT writes them: names, ends of names, simple patterns."""

import re
from collections.abc import Mapping

from rlhf_jax.files.printable import shown

MOST_PATTERNS = 64
"""With a wildcard; names without one may be as many as there are modules."""
_MOST_CHARACTERS = 200
_NAME = re.compile(r"\^?[\w.-]+\$?")
# Parts that cannot make matching slow: no groups, and one `.*` at most.
_PATTERN = re.compile(r"\^?(?:[\w-]|\\\.|\.\*|\.|\\d\+|\[0-9\]\+)++\$?")


class ModulePatterns:
    """The value of a module: that of the first pattern that matches its name.

    PEFT takes any regular expression for the end of a name. Here it is a name
    (`q_proj`, `self_attn.q_proj`, `^model.layers.0.mlp.up_proj`), or one with numbers
    (`\\\\d+` or `[0-9]+`) and at most one `.*`, so that no file can make matching slow.

    Args:
        field: name of the field, for messages.
        values: by pattern.

    Raises:
        ValueError: if a pattern is anything else.
    """

    def __init__(self, field: str, values: Mapping[str, float]):
        self._names: dict[str, tuple[int, float]] = {}
        self._patterns: list[tuple[int, re.Pattern[str], float]] = []
        for place, (pattern, value) in enumerate(values.items()):
            _check(field, pattern)
            plain = pattern.removesuffix("$").replace(r"\.", ".")
            if _NAME.fullmatch(plain):
                self._names.setdefault(plain, (place, value))
            else:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
                self._patterns.append((place, compiled, value))
        if len(self._patterns) > MOST_PATTERNS:
            raise ValueError(
                f"{field} has {len(self._patterns)} patterns with wildcards; at most "
                f"{MOST_PATTERNS} are supported"
            )

    def find(self, module: str) -> float | None:
        """The value of a module; None if no pattern matches."""
        words = module.split(".")
        ends = [".".join(words[i:]) for i in range(len(words))]
        found = [self._names[x] for x in (f"^{module}", *ends) if x in self._names]
        found += [
            (place, value)
            for place, pattern, value in self._patterns
            if pattern.match(module)
        ]
        return min(found)[1] if found else None


def _check(field: str, pattern: str) -> None:
    is_simple = len(pattern) <= _MOST_CHARACTERS and _PATTERN.fullmatch(pattern)
    if not is_simple or pattern.count(".*") > 1 or pattern.count("+") > 4:
        raise ValueError(
            f"{field} has {shown(pattern)}; supported: the name of a module or its "
            r"end, with \d+ for numbers and one .* for anything"
        )
