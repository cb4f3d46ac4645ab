"""Batches for property tests: drawn contents in fixed shapes, so nothing recompiles.

All numbers are odd multiples of a small power of two: never whole, never 0, and exact
in float32 even when dozens of them are added.
"""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

B, T = 4, 6
CHECK = settings(max_examples=25, deadline=None, derandomize=True)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
GARBAGE = st.sampled_from([np.nan, np.inf, -np.inf, 1e4, -1e6])

TOKEN_ARRAYS = (
    *("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy"),
    *("values", "old_values", "target_values", "rewards", "advantages", "returns"),
    "weights",
)
ROW_ARRAYS = ("scores", "end_values", "kl_coef")


def arrays(shape, bound=4.0):
    """Numbers in (−bound, bound), `bound` a power of two."""
    size = int(np.prod(shape))

    def numbers(raw):
        odd = 2 * np.frombuffer(raw, np.uint8).astype(np.float32) - 255
        return (odd * bound / 256).reshape(shape)

    return st.binary(min_size=size, max_size=size).map(numbers)


@st.composite
def ragged_masks(draw, *, shortest=0, longest=T):
    """Right-padded rows; there always is one of length 1 and one of the longest."""
    lengths = draw(st.lists(st.integers(shortest, longest), min_size=2, max_size=2))
    order = draw(st.permutations(range(B)))
    lengths = np.array([1, longest, *lengths])[order]
    return np.arange(T) < lengths[:, None]


@st.composite
def gappy_masks(draw):
    """Rows with masked tokens anywhere."""
    holes = draw(arrays((B, T))) < 0
    return draw(ragged_masks()) & ~holes


any_masks = st.one_of(ragged_masks(), gappy_masks())


@st.composite
def batches(draw, *, masks=any_masks):
    """One array of each kind, by name; policies are within 2 nats of each other."""
    batch = {name: draw(arrays((B, T))) for name in TOKEN_ARRAYS}
    for name in ("logprobs", "ref_logprobs", "sampler_logprobs"):
        batch[name] = batch["old_logprobs"] + batch[name] / 2
    batch |= {name: draw(arrays((B,))) for name in ROW_ARRAYS}
    for name in ("entropy", "weights", "kl_coef"):
        batch[name] = np.abs(batch[name])
    batch["truncated"] = draw(arrays((B,))) < 0
    batch["mask"] = draw(masks)
    return batch


def with_padding(batch, garbage):
    """The batch with something else wherever its mask is False."""
    return batch | {
        name: np.where(batch["mask"], batch[name], np.float32(garbage))
        for name in TOKEN_ARRAYS
    }
