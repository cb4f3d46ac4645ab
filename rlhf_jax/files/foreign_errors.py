"""Names what went wrong in a library that works with a file of someone else."""

import contextlib
from collections.abc import Iterator

from rlhf_jax.files.printable import one_line


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Raises ValueError, `what` and the reason, for whatever the block raises.

    Also for a panic of Rust, which is no Exception; not for Ctrl-C and signals.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = one_line(str(error).strip().split("\n")[0] or repr(error))
        raise ValueError(f"{what}: {reason}") from None
