"""One trunk, three heads: language model, critic, reward model."""

import jax

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.config import Head
from rlhf_jax.models.transformer import Transformer


def with_head(
    module: Transformer, params: Params, head: Head, *, key: Array | None = None
) -> tuple[Transformer, Params]:
    """The same trunk with another head.

    A reward model is initialized from the fine-tuned language model, with a new score
    head instead of the output matrix; the critic is initialized from the reward model,
    which has the same parameters.

    Args:
        module: a transformer.
        params: its parameters.
        head: the new head.
        key: initializes the score head if there is none; otherwise unused.

    Returns:
        The module with that head, and its parameters. Arrays are shared with `params`,
        not copied: copy one tree before donating the other.

    Raises:
        ValueError: if a new score head is needed and `key` is None, or the language
            model's output matrix is missing.
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
                f"head={head!r} of a language model needs a new score head; pass "
                "key=jax.random.key(seed) to initialize it"
            )
        params["score"] = fresh_score(params["final_norm"]["scale"], key)
    return module.clone(head=head), params


def fresh_score(like: Array, key: Array) -> Array:
    """Initializes a score head with standard deviation 1/√(D + 1).

    With the unit-variance output of the final norm, initial scores have variance near
    1.

    Args:
        like: `[D]`, defines shape, dtype and sharding.
        key: consumed.

    Returns:
        `[D]`.

    References:
        Stiennon et al., 2020, arXiv:2009.01325, appendix B.1.
    """
    stddev = (like.shape[0] + 1) ** -0.5
    score = stddev * jax.random.normal(key, like.shape, like.dtype)
    sharding = getattr(like, "sharding", None)  # None while tracing
    return score if sharding is None else jax.device_put(score, sharding)
