"""Learning-rate schedules and the AdamW they drive."""

from typing import Literal

import jax
import optax

from rlhf_jax.algo.types import Params

Schedule = Literal["constant", "linear", "cosine"]


def make_schedule(
    schedule: Schedule,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    end_fraction: float = 0.0,
) -> optax.Schedule:
    """Learning rate by optimizer step.

    Args:
        schedule: after warm-up, `"constant"`, or `"linear"` or `"cosine"` decay.
        learning_rate: the peak.
        total_steps: optimizer steps of the whole run, warm-up included.
        warmup_steps: steps of linear growth from 0.
        end_fraction: what is left of the peak at the end.
    """
    decay_steps = max(total_steps - warmup_steps, 1)
    end = end_fraction * learning_rate
    if schedule == "constant":
        main = optax.constant_schedule(learning_rate)
    elif schedule == "linear":
        main = optax.linear_schedule(learning_rate, end, decay_steps)
    elif schedule == "cosine":
        main = optax.cosine_decay_schedule(learning_rate, decay_steps, end_fraction)
    else:
        raise ValueError(f"schedule={schedule!r}; use 'constant', 'linear' or 'cosine'")
    if warmup_steps == 0:
        return main
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, main], [warmup_steps])


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-5,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping, as m̂ / (√v̂ + ε).

    Args:
        learning_rate: a number or a schedule over optimizer steps.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: ε, added after the root; 1e-5 in the OpenAI line of PPO.
        weight_decay: decoupled, on matrices only: not on biases, norms or heads.
        max_grad_norm: gradients of a larger global norm are scaled down; None: never.
    """
    steps = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    steps.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
    if weight_decay:
        steps.append(optax.add_decayed_weights(weight_decay, mask=_is_matrix))
    return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))


def _is_matrix(params: Params) -> Params:
    """True on kernels and embeddings, by name: stacked biases have two axes too."""

    def decays(path: tuple, _) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return name == "kernel" or name.endswith("embedding")

    return jax.tree_util.tree_map_with_path(decays, params)
