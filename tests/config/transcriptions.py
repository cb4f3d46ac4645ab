"""Six implementations of PPO for language models, each written down once more in NumPy.

From "log-probabilities, values and scores of a rollout" to "gradient of the loss", with
the numbers each of them ships, float64, one token at a time. Nothing here imports
`rlhf_jax`: a test holds the package's presets to these. Line numbers refer to

- openai/lm-human-preferences at cbfd210
- vwxyzjn/summarize_from_feedback_details at ee77a9a
- huggingface/trl 1.12.0
- OpenRLHF/OpenRLHF at 3c3be62
- verl-project/verl at 1dda039
- deepspeedai/DeepSpeedExamples at 45b4b71

One process, one minibatch: what an original does per rank or per minibatch happens over
the whole batch here.
"""

import math

import numpy as np
from config.transcription_parts import (
    Batch,
    Numbers,
    adapted_kl_coef,
    gae_row,
    ppo_losses,
    whiten_columns,
)


def transcribe_openai_2019(batch: Batch) -> Numbers:
    """openai/lm-human-preferences, `train_policy.py`, `utils/core.py` and `launch.py`.

    Responses have a fixed length and there are no masks: every one of the T columns is
    penalised, whitened, trained and counted in the KL of the controller, so nothing is
    garbage and all columns must be real. `lengths` only says where the reward model
    stopped reading, and is not read here. The score, −1 for a text that never stopped
    (lm_tasks.py:32), goes on the last column (train_policy.py:153). Rewards are
    whitened with their mean kept, then GAE with λ = .95, then advantages are whitened,
    all inside the loss (324–339), with ddof 0 (core.py:336). Controller of the
    sentiment and descriptiveness runs: target 6 for the KL summed over a sequence
    (launch.py:131), horizon 10000 episodes (train_policy.py:28).
    """
    rows, width = batch.old_logprobs.shape
    everything = [width] * rows
    rewards = np.zeros((rows, width))
    total_kl = 0.0
    for b in range(rows):
        for t in range(width):
            kl = batch.old_logprobs[b, t] - batch.ref_logprobs[b, t]
            rewards[b, t] = -batch.kl_coef * kl
            total_kl += kl
        rewards[b, -1] += -1.0 if batch.truncated[b] else batch.scores[b]
    rewards = whiten_columns(rewards, everything, ddof=0, center=False)
    raw = np.array(
        [gae_row(rewards[b], batch.old_values[b], 0.95) for b in range(rows)]
    )
    advantages = whiten_columns(raw, everything, ddof=0)
    returns = raw + batch.old_values
    return Numbers(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        **ppo_losses(
            batch,
            advantages,
            returns,
            policy_columns=everything,
            value_columns=everything,
            value_clip=0.2,
            value_coef=0.1,
        ),
        next_kl_coef=adapted_kl_coef(
            batch.kl_coef, total_kl / rows, target=6.0, episodes=rows, horizon=10000
        ),
    )


def transcribe_nplus_tldr(batch: Batch, microbatches: int = 1) -> Numbers:
    """vwxyzjn/summarize_from_feedback_details, `ppo.py`.

    A response without a stop token scores −1 (ppo.py:129, 667). Whitening has ddof 0
    (237). `microbatches` of the run itself: one row each (95). The rest as in
    `_score_after_the_end`.
    """
    scores = np.where(batch.truncated, -1.0, batch.scores)
    return _score_after_the_end(batch, scores, ddof=0, microbatches=microbatches)


def transcribe_trl(batch: Batch, microbatches: int = 1) -> Numbers:
    """huggingface/trl, `experimental/ppo/ppo_trainer.py` and `ppo_config.py`.

    No penalty for a missing stop token (ppo_config.py:172), so `truncated` is not read.
    Whitening has ddof 1 (ppo_trainer.py:266). A row ends before its first pad token
    (727): where pad and stop token are one, `lengths` does not count the stop token.
    The rest as in `_score_after_the_end`.
    """
    return _score_after_the_end(batch, batch.scores, ddof=1, microbatches=microbatches)


def _score_after_the_end(
    batch: Batch, scores: np.ndarray, *, ddof: int, microbatches: int
) -> Numbers:
    """The common part of N+ (ppo.py:670–756) and TRL (ppo_trainer.py:763–847).

    The score is paid one column after the last token, where no KL is paid, and on the
    last token of a full row. The state there keeps its value: GAE with λ = .95 starts
    from it, and the critic is trained on it. Advantages are whitened over response
    tokens and 0 elsewhere. Each micro-batch takes the mean over its own tokens.
    """
    rows, width = batch.old_logprobs.shape
    tokens = [int(n) for n in batch.lengths]
    states = [min(n + 1, width) for n in tokens]
    rewards, raw, returns = (np.zeros((rows, width)) for _ in range(3))
    for b in range(rows):
        for t in range(tokens[b]):
            kl = batch.old_logprobs[b, t] - batch.ref_logprobs[b, t]
            rewards[b, t] = -batch.kl_coef * kl
        end = states[b]
        rewards[b, end - 1] += scores[b]
        raw[b, :end] = gae_row(rewards[b, :end], batch.old_values[b, :end], 0.95)
        returns[b, :end] = raw[b, :end] + batch.old_values[b, :end]
    advantages = whiten_columns(raw, tokens, ddof=ddof)
    return Numbers(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        **ppo_losses(
            batch,
            advantages,
            returns,
            policy_columns=tokens,
            value_columns=states,
            value_clip=0.2,
            value_coef=0.1,
            microbatches=microbatches,
        ),
        next_kl_coef=batch.kl_coef,
    )


def transcribe_openrlhf(batch: Batch) -> Numbers:
    """OpenRLHF, `models/loss.py`, `models/utils.py`, `experience_maker.py`.

    k1 clamped to ±10 (utils.py:95) in the reward, score clamped to ±10
    (train_ppo_ray.py:437) on the last token (utils.py:121), λ = 1
    (train_ppo_ray.py:391), whitening over the whole batch, ddof 0, with the variance
    clamped instead of shifted (experience_maker.py:323). Log-ratios are clamped to ±20
    (loss.py:168), values clip at .5 (train_ppo_ray.py:390); both losses are means over
    all tokens of the optimizer step (loss.py:32); the critic has its own optimizer. The
    KL coefficient is fixed (ppo_trainer.py:176) and counts as 0 below 0 (utils.py:105).
    Nothing is made of `truncated`. After whitening, padding holds shifted numbers in
    the original; it is 0 here.
    """
    rows, width = batch.old_logprobs.shape
    tokens = [int(n) for n in batch.lengths]
    rewards, raw, returns = (np.zeros((rows, width)) for _ in range(3))
    for b, end in enumerate(tokens):
        for t in range(end):
            kl = batch.old_logprobs[b, t] - batch.ref_logprobs[b, t]
            rewards[b, t] = -max(batch.kl_coef, 0.0) * min(max(kl, -10.0), 10.0)
        rewards[b, end - 1] += min(max(batch.scores[b], -10.0), 10.0)
        raw[b, :end] = gae_row(rewards[b, :end], batch.old_values[b, :end], 1.0)
        returns[b, :end] = raw[b, :end] + batch.old_values[b, :end]
    count = sum(tokens)
    mean = sum(raw[b, t] for b in range(rows) for t in range(tokens[b])) / count
    squares = [(raw[b, t] - mean) ** 2 for b in range(rows) for t in range(tokens[b])]
    scale = 1.0 / math.sqrt(max(sum(squares) / count, 1e-8))
    advantages = np.zeros((rows, width))
    for b, end in enumerate(tokens):
        advantages[b, :end] = (raw[b, :end] - mean) * scale
    return Numbers(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        **ppo_losses(
            batch,
            advantages,
            returns,
            policy_columns=tokens,
            value_columns=tokens,
            value_clip=0.5,
            value_coef=1.0,
            log_ratio_clamp=20.0,
        ),
        next_kl_coef=batch.kl_coef,
    )


def transcribe_verl(batch: Batch) -> Numbers:
    """verl, `trainer/ppo/core_algos.py` and `trainer/config`, adv_estimator=gae.

    No KL anywhere (ppo_trainer.yaml:98, actor.yaml:103): `ref_logprobs` is not read.
    The score is on the last token (agent_loop.py:144, 1067), λ = 1
    (ppo_trainer.yaml:71), whitening over the whole batch with ddof 1
    (core_algos.py:262; the 1e-8 its means add to a count vanishes in float32).
    Log-ratios are clamped to ±20 (1338), dual clip at 3 (actor.yaml:83), values clip at
    .5 (critic.yaml:61); both losses are means over all tokens of the minibatch
    (core_algos.py:1175); the critic has its own optimizer. Nothing is made of
    `truncated`. After whitening, padding holds shifted numbers in the original; it is 0
    here.
    """
    rows, width = batch.old_logprobs.shape
    tokens = [int(n) for n in batch.lengths]
    rewards, raw, returns = (np.zeros((rows, width)) for _ in range(3))
    for b, end in enumerate(tokens):
        rewards[b, end - 1] = batch.scores[b]
        raw[b, :end] = gae_row(rewards[b, :end], batch.old_values[b, :end], 1.0)
        returns[b, :end] = raw[b, :end] + batch.old_values[b, :end]
    advantages = whiten_columns(raw, tokens, ddof=1)
    return Numbers(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        **ppo_losses(
            batch,
            advantages,
            returns,
            policy_columns=tokens,
            value_columns=tokens,
            value_clip=0.5,
            value_coef=1.0,
            dual_clip=3.0,
            log_ratio_clamp=20.0,
        ),
        next_kl_coef=batch.kl_coef,
    )


def transcribe_deepspeed_chat(batch: Batch) -> Numbers:
    """DeepSpeed-Chat, `dschat/rlhf/ppo_trainer.py`.

    Departures that follow from its indexing (lines 186–192, 215–220): the slice up to
    `ends` has one column more than the response has tokens, and the score, clamped to
    ±5 (67), is paid on its last column: column `lengths[b]`, or the last token of a
    full row. That column belongs to the first pad token, so its reward holds the KL of
    a pad token, too: columns 0 to `lengths[b]` of `old_logprobs`, `ref_logprobs` and
    `old_values` are read. GAE with λ = .95 starts from that state and its value, but
    neither loss has it, because the mask is that of the tokens (208).

    The original counts tokens that are not pad. Its tokenizers outside of Llama pad
    with the stop token (utils.py:88). There `lengths` has to leave out the stop token,
    and column `lengths[b]` is the stop token itself: the score is where it belongs, and
    neither network is trained on that token.

    No whitening, no penalty for a missing stop token (`truncated` is not read), a fixed
    KL coefficient (66), value clip .2 (69), means over the tokens of the batch (289,
    304), an engine of its own for the critic.
    """
    rows, width = batch.old_logprobs.shape
    tokens = [int(n) for n in batch.lengths]
    rewards, advantages, returns = (np.zeros((rows, width)) for _ in range(3))
    for b in range(rows):
        end = min(tokens[b] + 1, width)
        for t in range(end):
            kl = batch.old_logprobs[b, t] - batch.ref_logprobs[b, t]
            rewards[b, t] = -batch.kl_coef * kl
        rewards[b, end - 1] += min(max(batch.scores[b], -5.0), 5.0)
        raw = gae_row(rewards[b, :end], batch.old_values[b, :end], 0.95)
        for t in range(tokens[b]):
            advantages[b, t] = raw[t]
            returns[b, t] = raw[t] + batch.old_values[b, t]
    return Numbers(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        **ppo_losses(
            batch,
            advantages,
            returns,
            policy_columns=tokens,
            value_columns=tokens,
            value_clip=0.2,
            value_coef=1.0,
        ),
        next_kl_coef=batch.kl_coef,
    )
