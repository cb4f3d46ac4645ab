"""Every formula of the package, as pure functions of arrays.

To read it in one sitting, follow a rollout:

    types               what B, T and S are; the records from prompts to update
    masking             which tokens are real, and every mean over them
    logprobs, sampling  log π of tokens, and tokens from π
    kl, rewards         the penalty, and one score → one reward per token
    advantages          rewards and values → GAE and its relatives
    losses              the clipped losses, and `ppo_loss` of an experience
    diagnostics         what to watch
    minibatches         shuffling a batch

What is left are alternatives, each read when it is needed: `score_moments` and
`length_penalties` for scores; `group_advantages`, `critic_free`, `policy_losses` and
`covariance_losses` for methods without a critic; `off_policy` for another sampler;
`preferences` for reward models. `options` names every alternative.
"""
