"""Learning-rate schedules and AdamW."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algo.types import Params

Schedule = Literal["constant", "linear", "cosine"]
AdamForm = Literal["torch", "tf1"]


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
        total_steps: optimizer steps of the whole run, including warm-up.
        warmup_steps: steps of linear warm-up from 0.
        end_fraction: final learning rate as a fraction of the peak.
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
    form: AdamForm = "torch",
    weight_decay: float = 0.0,
    decay: Literal["matrices", "all"] = "matrices",
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping.

    Args:
        learning_rate: a number or a schedule over optimizer steps.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: ε, added after the square root; 1e-5 in OpenAI-style PPO.
        form: `"torch"`, m̂ / (√v̂ + ε), as in PyTorch and optax, or `"tf1"`: see
            `scale_by_tf1_adam`.
        weight_decay: decoupled (AdamW).
        decay: parameters with weight decay: `"matrices"`, kernels, embeddings and
            adapters, or `"all"`, including biases, norms and heads, the default of
            PyTorch's AdamW.
        max_grad_norm: global gradient norm for clipping; None: no clipping.

    Raises:
        ValueError: on an unknown `form` or `decay`.
    """
    if form not in ("torch", "tf1"):
        raise ValueError(f"form={form!r}; use 'torch' or 'tf1'")
    if decay not in ("matrices", "all"):
        raise ValueError(f"decay={decay!r}; use 'matrices' or 'all'")
    adam = optax.scale_by_adam if form == "torch" else scale_by_tf1_adam
    steps = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    steps.append(adam(b1=b1, b2=b2, eps=eps))
    if weight_decay:
        mask = _is_matrix if decay == "matrices" else None
        steps.append(optax.add_decayed_weights(weight_decay, mask=mask))
    return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))


def scale_by_tf1_adam(
    *, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Adam as in TensorFlow 1, with ε added to the *uncorrected* √v.

        √(1 − b2ᵗ) / (1 − b1ᵗ) · m / (√v + ε)

    Equivalent to optax's m̂ / (√v̂ + ε̂) with ε̂ = ε / √(1 − b2ᵗ): at the first step
    with b2 = 0.999, ε is 32 times larger. It damps the first steps if gradients are as
    small as ε, as in OpenAI-style PPO.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: ε.

    References:
        Kingma and Ba, 2015, arXiv:1412.6980, end of section 2; TensorFlow's
        `tf.train.AdamOptimizer`.
    """

    def init(params: Params) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
        )

    def update(updates: Params, state: optax.OptState, params: Params | None = None):
        assert isinstance(state, optax.ScaleByAdamState)
        grads = updates
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(
            lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads
        )
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        steps = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        return steps, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _is_matrix(params: Params) -> Params:
    """True on kernels, embeddings and adapters; stacked biases have two axes too."""

    def decays(path: tuple, _) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return name in ("kernel", "lora_a", "lora_b") or name.endswith("embedding")

    return jax.tree_util.tree_map_with_path(decays, params)
