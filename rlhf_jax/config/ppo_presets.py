"""Six implementations of PPO for language models, each as a complete preset.

A preset sets the method only; models, data, batch size and lengths are left to the run.
Each function returns a `PPOMethod`, to be modified with `dataclasses.replace`; on the
command line, `rlhf-jax ppo --preset trl`, followed by flags.

Presets leave out details of an original that have no effect on training or are bugs;
the docstrings list them.
"""

import dataclasses

from rlhf_jax.algo.options import (
    AdvantageOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
    ValueLossOptions,
)
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.config.run import OptimizerConfig

_OPENAI_LINE = OptimizerConfig(
    learning_rate=3e-6,
    schedule="linear",
    warmup_fraction=0.0,
    end_fraction=0.0,
    b2=0.999,
    eps=1e-5,
    max_grad_norm=0.0,
)


def openai_2019() -> PPOMethod:
    """openai/lm-human-preferences, with the settings of its books tasks.

    KL in the reward with the adaptive β of the books tasks (0.15, target 6 nats per
    response, horizon 10,000); scores normalized by the mean and standard deviation of
    the reference's responses; −1 for a response without a stop token; token rewards
    whitened without centering; advantages whitened inside the loss. Responses have a
    fixed length: tokens after the stop token are hidden from the reward model, but
    sampled and trained on, and the reward is on the last of them. Shared trunk, value
    head initialized at 0, one Adam in TensorFlow's form.

    Left to the run: the stop token (`--stop .` there; the original ignores it among the
    first 16 tokens, this library does not). Differences from the paper: it mentions
    neither whitening, and its controller has a constant gain. In the original, β turns
    negative if a batch has more than 5 · horizon episodes, which `adapt_kl_coef`
    prevents; whitening is per rank (of 8); and the learning rate decays once per
    update, here at every optimizer step.

    References:
        Ziegler et al., 2019, arXiv:1909.08593; Huang et al., 2023, "The N
        implementation details of RLHF with PPO".
    """
    optimizer = dataclasses.replace(_OPENAI_LINE, learning_rate=1e-5, form="tf1")
    return PPOMethod(
        temperature=0.7,
        after_stop="keep",
        old_logprobs="sampler",
        kl=KLOptions(coef=0.15, target=6.0, horizon=10_000),
        scores=ScoreOptions(
            normalization="reference",
            missing_eos="replace",
            missing_eos_penalty=-1.0,
            whiten_rewards=True,
        ),
        advantages=AdvantageOptions(lam=0.95, whiten="minibatch"),
        policy_loss=PolicyLossOptions(),
        value_loss=ValueLossOptions(clip_eps=0.2, coef=0.1),
        epochs=4,
        minibatches=1,
        critic_trunk="shared",
        critic_head_std=0.0,
        actor_optimizer=optimizer,
        critic_optimizer=optimizer,
    )


def nplus_tldr() -> PPOMethod:
    """vwxyzjn/summarize_from_feedback_details: "The N+ implementation details".

    KL in the reward, β = 0.05; the score on the state after the last token, whose
    value is used and trained; −1 for a response without EOS; advantages whitened over
    response tokens (ddof 0); a separate critic, initialized from the reward model, in
    one loss with weight 0.1; AdamW with ε = 1e-5 and PyTorch's weight decay of 0.01 on
    all parameters; each microbatch averaged separately. A microbatch is one response
    there, so set `--microbatches` to the responses per minibatch to match it.

    Differences from the original: it whitens per rank (of 8), this preset over the
    batch (`whiten="shard"` is per rank); it decays the learning rate manually once per
    update, here at every optimizer step, and never reads its scheduler argument; it
    does not correct the positions of left-padded prompts, because generation collapsed
    with the correction, this library does. The reward model's bias (its mean reward on
    the normalization set) belongs to the checkpoint.

    References:
        Huang et al., 2024, arXiv:2403.17031.
    """
    optimizer = dataclasses.replace(_OPENAI_LINE, weight_decay=0.01, decay="all")
    return PPOMethod(
        temperature=0.7,
        old_logprobs="sampler",
        kl=KLOptions(coef=0.05),
        scores=ScoreOptions(
            missing_eos="replace",
            missing_eos_penalty=-1.0,
            position="after_last_token",
        ),
        advantages=AdvantageOptions(lam=0.95, whiten="batch"),
        policy_loss=PolicyLossOptions(mean_of_means=True),
        value_loss=ValueLossOptions(clip_eps=0.2, coef=0.1),
        epochs=4,
        minibatches=1,
        actor_optimizer=optimizer,
        critic_optimizer=optimizer,
    )


def trl() -> PPOMethod:
    """TRL's `PPOTrainer` (1.12, the last release that has it), at its defaults.

    As `nplus_tldr`, from which it was ported, but with ddof 1 in whitening, scores kept
    for responses without a stop token, and Adam with ε = 1e-8 and no weight decay. The
    mean of means is over microbatches: `--microbatches` corresponds to
    `gradient_accumulation_steps`.

    Differences between TRL and its documentation: `missing_eos_penalty` checks only the
    tokenizer's EOS, whatever `stop_token` is; `max_grad_norm` is never applied; with
    gradient accumulation, `num_mini_batches` adds no optimizer steps; masks are derived
    from the pad id, so padding inside a prompt, or an EOS equal to the pad, changes the
    result (here masks come from lengths). Its learning rate decays once per update,
    here at every optimizer step.

    References:
        https://huggingface.co/docs/trl/v1.12.0/ppo_trainer.
    """
    optimizer = dataclasses.replace(_OPENAI_LINE, eps=1e-8)
    return dataclasses.replace(
        nplus_tldr(),
        scores=ScoreOptions(position="after_last_token"),
        advantages=AdvantageOptions(lam=0.95, whiten="batch", ddof=1),
        actor_optimizer=optimizer,
        critic_optimizer=optimizer,
    )


def openrlhf() -> PPOMethod:
    """OpenRLHF 0.11 at its defaults.

    KL in the reward, β = 0.01, each term clamped to ±10; scores clipped to ±10; λ = 1;
    advantages whitened over the whole batch; one epoch of several optimizer steps on
    recomputed log-probabilities; separate optimizers for actor and critic.

    Differences between OpenRLHF and its documentation: the clamp that a comment
    describes for k3 also applies to k1. Its whitening clamps the variance from below
    instead of adding ε, which matters only for constant advantages. For a critic
    initialized from a language model, its head has standard deviation 1/(width + 1):
    `--critic-head-std`.

    References:
        Hu et al., 2024, arXiv:2405.11143.
    """
    optimizer = OptimizerConfig(
        learning_rate=1e-6,
        schedule="cosine",
        warmup_fraction=0.03,
        end_fraction=0.1,
        b2=0.95,
        eps=1e-8,
        max_grad_norm=1.0,
    )
    return PPOMethod(
        temperature=1.0,
        old_logprobs="recomputed",
        kl=KLOptions(coef=0.01, clamp=10.0),
        scores=ScoreOptions(clip=10.0),
        advantages=AdvantageOptions(lam=1.0, whiten="batch"),
        policy_loss=PolicyLossOptions(log_ratio_clamp=20.0),
        value_loss=ValueLossOptions(clip_eps=0.5),
        epochs=1,
        minibatches=8,
        actor_optimizer=optimizer,
        critic_optimizer=dataclasses.replace(optimizer, learning_rate=9e-6),
    )


def verl() -> PPOMethod:
    """verl 0.9 with `adv_estimator=gae`, at its defaults.

    No KL; λ = 1; advantages whitened over the whole batch with ddof 1; dual clip at 3;
    value clip 0.5; AdamW with weight decay 0.01 on all parameters; separate optimizers
    for actor and critic.

    Surprising defaults: the dual clip is on, and the reference is off.

    References:
        Sheng et al., 2024, arXiv:2409.19256.
    """
    optimizer = OptimizerConfig(
        learning_rate=1e-6,
        schedule="constant",
        warmup_fraction=0.0,
        end_fraction=0.0,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        decay="all",
        max_grad_norm=1.0,
    )
    return PPOMethod(
        temperature=1.0,
        old_logprobs="recomputed",
        kl=KLOptions(place="none"),
        scores=ScoreOptions(),
        advantages=AdvantageOptions(lam=1.0, whiten="batch", ddof=1),
        policy_loss=PolicyLossOptions(dual_clip=3.0, log_ratio_clamp=20.0),
        value_loss=ValueLossOptions(clip_eps=0.5),
        epochs=1,
        minibatches=4,
        actor_optimizer=optimizer,
        critic_optimizer=dataclasses.replace(optimizer, learning_rate=1e-5),
    )


def deepspeed_chat() -> PPOMethod:
    """DeepSpeed-Chat's `ppo_trainer.py`.

    KL in the reward, β = 0.1; scores clipped to ±5, on the state after the last token,
    whose value is bootstrapped from but not trained; advantages not whitened; one epoch
    on recomputed log-probabilities; separate engines for actor and critic.

    Differences between the original and its comments: it adds the KL of the pad token
    to the score in the state after the last token; here that state has no KL. Its
    log-probabilities ignore the sampling temperature, so only 1 is on-policy, and are
    recomputed in training mode, with dropout if the model has any. Its 100 warm-up
    steps are 5 % of the run here.

    References:
        Yao et al., 2023, arXiv:2308.01320.
    """
    optimizer = OptimizerConfig(
        learning_rate=9.65e-6,
        schedule="cosine",
        warmup_fraction=0.05,
        end_fraction=0.0,
        b2=0.95,
        eps=1e-8,
        max_grad_norm=1.0,
    )
    return PPOMethod(
        temperature=1.0,
        old_logprobs="recomputed",
        kl=KLOptions(coef=0.1),
        scores=ScoreOptions(clip=5.0, position="after_last_token", end_value="kept"),
        advantages=AdvantageOptions(lam=0.95, whiten="none"),
        policy_loss=PolicyLossOptions(),
        value_loss=ValueLossOptions(clip_eps=0.2),
        epochs=1,
        minibatches=1,
        actor_optimizer=optimizer,
        critic_optimizer=dataclasses.replace(optimizer, learning_rate=5e-6),
    )


PPO_PRESETS = {
    "openai_2019": openai_2019,
    "nplus_tldr": nplus_tldr,
    "trl": trl,
    "openrlhf": openrlhf,
    "verl": verl,
    "deepspeed_chat": deepspeed_chat,
}
