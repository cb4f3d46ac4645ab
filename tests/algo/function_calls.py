"""What a case of `function_cases` is, and short ways to write one."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import rlhf_jax as rj

# Reasons that cases of several files have.
ELEMENTWISE = "one number in, one out: its docstring asks the caller to mask"
WHITENS = "by the mean and variance of the whole batch"


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and what it promises beyond what all functions do.

    All promise: the same under `jit`, `vmap` and 64-bit types, float32 results of
    inputs of any precision, and no NaN of one token or none.
    """

    call: Callable[..., Any]  # of a batch as from `arrays`, and of `options`
    reads: str  # the arrays of the batch that it reads, those to differentiate first
    slopes: int = 0  # how many of `reads` have a gradient; all others get exactly 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    one: dict[str, Any] = dataclasses.field(default_factory=dict)  # for a batch of one
    # Parts of a batch: "rows" are computed each for itself; a function of the batch
    # gives options with which results of parts add up to those of the whole; a reason
    # says why they do neither. Then the whole batch is spread over devices.
    parts: str | Callable[..., dict] = "rows"
    local: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of a part
    padding: str = "unread"  # or the reason why results are garbage there
    empty: float | None = None  # what results are where no token is real, if said
    dtype: str = "float32"  # or the reason why floats keep the dtype they came in
    rounds: str = ""  # why bfloat16 inputs give other numbers than the same in float32
    second: str = "finite"  # or the reason why second derivatives are not promised
    drawn_bits: bool = False  # draws bits whose width follows the switch of x64


def of(function, *names, keywords=(), **fixed):
    """Calls a function with arrays by name, in this order, and with `keywords`."""

    def call(x, **options):
        by_name = {name: x[name] for name in keywords}
        return function(*(x[name] for name in names), **by_name, **fixed, **options)

    return call


def surrogate(function, options=None, *, keyed=False, **promises):
    names = ("logprobs", "old_logprobs", "advantages", "mask")

    def call(x, **options):
        key = {"key": jax.random.key(0)} if keyed else {}
        return function(*(x[name] for name in names), **key, **options)

    reads = " ".join(names)
    return Case(call, reads, 1, options or {}, empty=0.0, **promises)


def plain(function, reads, slopes=0, options=None, **promises):
    """A function of just those arrays, in that order."""
    return Case(of(function, *reads.split()), reads, slopes, options or {}, **promises)


def experience(x, **fields):
    return rj.Experience(
        **{k: x[k] for k in ("mask", "old_logprobs", "advantages")}, **fields
    )


def actor(x, *, kl, **options):
    names = ("weights", "kl_coef", "ref_logprobs") if kl else ()
    return rj.actor_loss(
        x["logprobs"],
        experience(x, **{k: x[k] for k in names}),
        entropy=x["entropy"],
        **options,
    )


def critic(x, **options):
    names = ("old_values", "returns", "value_mask")
    return rj.critic_loss(
        x["values"], experience(x, **{k: x[k] for k in names}), **options
    )


def ppo(x, **options):
    names = (
        "weights",
        "kl_coef",
        "ref_logprobs",
        "old_values",
        "returns",
        "value_mask",
    )
    return rj.ppo_loss(
        x["logprobs"],
        x["values"],
        experience(x, **{k: x[k] for k in names}),
        entropy=x["entropy"],
        **options,
    )


def normalized(x, **options):
    moments = rj.ScoreMoments(
        **{k: jnp.float32(v) for k, v in (("count", 4), ("mean", 0.5), ("squares", 3))}
    )
    return rj.normalize_scores(x["scores"], moments, **options)


def adapted(x, **options):
    adapt = partial(rj.adapt_kl_coef, **options)
    return jax.vmap(adapt)(x["kl_coef"], x["observed_kl"])


def over_groups(function, *, ids=False, **options):
    """A function of scores and groups: of two answers each, or by ids."""

    def call(x, *, groups=2, **options):
        return function(x["scores"], x["ids"] if ids else groups, **options)

    if ids:
        return Case(call, "scores ids", options=options)
    return Case(call, "scores", options=options | {"groups": 2}, one={"groups": 1})


def whole(case, why):
    """The case, with the reason why parts of a batch do not make up the whole."""
    return dataclasses.replace(case, parts=why)
