"""All formulas of the package, as pure functions of arrays.

Suggested reading order:

    types               what B, T and S are; the records from prompts to update
    masking             which tokens are real, and masked reductions
    logprobs, sampling  log π of tokens, and tokens from π
    kl, rewards         the KL penalty, and token rewards from scores
    advantages          GAE and variants from rewards and values
    losses              the clipped losses, and `ppo_loss` of an experience
    diagnostics         what to monitor
    minibatches         shuffling a batch

The rest are alternatives: `scores` for scores; `group_advantages`, `reinforce`,
`policy_losses` and `covariance_losses` for critic-free methods; `off_policy` for
sampler–trainer mismatch; `preferences` for reward models. `options` lists all
alternatives.
"""
