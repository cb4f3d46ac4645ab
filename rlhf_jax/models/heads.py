"""One trunk, three heads: language model, critic, reward model."""

import jax

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.config import Head
from rlhf_jax.models.transformer import Transformer


def with_head(
    module: Transformer, params: Params, head: Head, *, key: Array | None = None
) -> tuple[Transformer, Params]:
    """The same trunk under another head.

    A reward model starts from the fine-tuned language model (a fresh score vector
    takes the place of the output matrix); the critic starts from the reward model
    (which has the same parameters).

    Args:
        module: a transformer.
        params: its parameters.
        head: the head wanted.
        key: draws the score vector where the trunk has none; otherwise not used.

    Returns:
        The module with that head, and its parameters. Arrays are shared with `params`,
        not copied: copy one of the two trees before donating the other.

    Raises:
        ValueError: a fresh score vector is needed and `key` is None; or the language
            model's output matrix is gone.
    """
    params = dict(params)
    if head == "lm":
        if not module.config.tie_embeddings and "output_embedding" not in params:
            raise ValueError(
                "head='lm' needs an output matrix, which a value or reward model with "
                "tie_embeddings=False does not have; start from the language model"
            )
        params.pop("score", None)
        return module.clone(head=head), params
    params.pop("output_embedding", None)
    if "score" not in params:
        if key is None:
            raise ValueError(
                f"head={head!r} of a language model starts from a fresh score vector; "
                "pass key=jax.random.key(seed) to draw it"
            )
        params["score"] = fresh_score(params["final_norm"]["scale"], key)
    return module.clone(head=head), params


def fresh_score(like: Array, key: Array) -> Array:
    """A score vector with standard deviation 1/√(D + 1).

    On the unit-variance output of the final norm, fresh scores have a variance near 1.

    Args:
        like: `[D]`, gives shape, dtype and placement.
        key: consumed.

    Returns:
        `[D]`.

    References:
        Stiennon et al., 2020, arXiv:2009.01325, appendix B.1.
    """
    stddev = (like.shape[0] + 1) ** -0.5
    score = stddev * jax.random.normal(key, like.shape, like.dtype)
    return jax.device_put(score, like.sharding)
