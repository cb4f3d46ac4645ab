"""Options flipped one by one: what the tests of dead options share.

A policy that reads one token, a reward, and the cases of the options that every method
has. The sampler is given slightly other numbers than the trainer, as another engine
would have, so that the source of the old log-probabilities matters.

Cases are `{option: (value it is flipped to, what else has to be so for it to matter)}`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from bare_models import bigram_logits

from rlhf_jax.models.callables import Policy
from rlhf_jax.rollout import token_logprobs_from_logits

V, T, B = 8, 4, 16
STOP = 3
SIZES = {
    "run_dir": "unused",
    "policy": "unused",
    "reward_model": "unused",
    "data": "unused",
    "batch_size": B,
    "max_new_tokens": T,
    "updates": 2,
}

RECOMPUTED = {"old_logprobs": "recomputed"}
CORRECTED = RECOMPUTED | {"policy_loss.sampler_correction": "truncate"}
POLICY_LOSS_CASES = {
    "policy_loss.surrogate": ("gspo", {}),
    "policy_loss.ratio_bound": (0.9, {"policy_loss.surrogate": "cispo"}),
    "policy_loss.clip_eps": (0.05, {}),
    "policy_loss.clip_eps_high": (0.05, {"policy_loss.clip_eps": 0.2}),
    "policy_loss.dual_clip": (1.01, {"policy_loss.clip_eps": 0.5}),
    "policy_loss.log_ratio_clamp": (0.01, {}),
    "policy_loss.aggregation": ("seq-mean-token-mean", {}),
    "policy_loss.mean_of_means": (True, {"microbatches": 2, "minibatches": 2}),
    "policy_loss.entropy_coef": (0.1, {}),
    "policy_loss.sampler_correction": ("truncate", RECOMPUTED),
    "policy_loss.sampler_level": ("sequence", CORRECTED),
    "policy_loss.sampler_bound": (1.0, CORRECTED),
    "policy_loss.sampler_lower_bound": (0.95, CORRECTED),
}
OPTIMIZER_CASES = {
    "learning_rate": (0.01, {}),
    "schedule": ("constant", {}),
    "warmup_fraction": (0.5, {}),
    "end_fraction": (0.5, {}),
    "b1": (0.5, {}),
    "b2": (0.5, {}),
    "eps": (0.1, {}),
    "form": ("tf1", {}),
    "weight_decay": (0.5, {}),
    "decay": ("all", {"weight_decay": 0.5}),
    "max_grad_norm": (0.01, {"eps": 0.1}),
}


def optimizer_cases(name):
    """The cases of one optimizer of a configuration."""
    return {
        f"{name}.{option}": (value, {f"{name}.{k}": v for k, v in needs.items()})
        for option, (value, needs) in OPTIMIZER_CASES.items()
    }


def options_of(cls, prefix=""):
    """Names of all leaves, dotted."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from options_of(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def configured(config, changes):
    """The configuration with dotted options replaced, checked."""
    for option, value in changes.items():
        config = _replaced(config, option.split("."), value)
    config.validate()
    return config


def _replaced(options, path, value):
    name, *rest = path
    if rest:
        value = _replaced(vars(options)[name], rest, value)
    return dataclasses.replace(options, **{name: value})


def as_vector(tree):
    """All parameters, one after the other."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def actor_params(seed):
    """A matrix, by its name, and a bias, which is none."""
    kernel = 0.5 * jax.random.normal(jax.random.key(seed), (V, V))
    return {"kernel": kernel, "bias": 0.1 * jnp.arange(V, dtype=jnp.float32)}


def reference_params():
    """Far from every actor, so that the KL of a handful of answers is above 0."""
    return jax.tree.map(lambda x: 3 * x, actor_params(1))


def logits(params, tokens, mask):
    """`[B, S, V]`: the row of the token just read."""
    return bigram_logits(params["kernel"], tokens, mask) + params["bias"][None, None]


def _prefill(params, tokens, mask, *, cache_length):
    return _other_engine(params, tokens[:, -1]), jnp.zeros((), jnp.int32)


def _decode(params, tokens, cache):
    return _other_engine(params, tokens), cache + 1


def _other_engine(params, tokens):
    """The policy as a sampler with other kernels would compute it."""
    return 1.2 * (params["kernel"][tokens] + params["bias"][None])


POLICY = Policy(token_logprobs_from_logits(logits), _prefill, _decode)


def score(_, tokens, mask):
    """`[B]`: an even token is worth 1, an odd one −½; all columns that are read."""
    worth = jnp.where(tokens % 2 == 0, 1.0, -0.5) * (1.0 + 0.1 * tokens)
    return jnp.sum(jnp.where(mask, worth, 0.0), axis=1)
