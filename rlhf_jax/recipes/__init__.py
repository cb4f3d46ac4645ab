"""The training stages `sft`, `reward_model`, `ppo` and `grpo`, and what they share."""
