"""The configuration of `show-data`.

The string below each field is its help on the command line.
"""

import dataclasses
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.recipes.configs import RewardConfig, SFTConfig
from rlhf_jax.recipes.policy_configs import PolicyConfig
from rlhf_jax.runtime.config import Overlong, check_positive
from rlhf_jax.runtime.row_forms import TrainOn

NO_RUN = "-"
"""Stands where a run directory or a reward would, which showing data does not need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowDataConfig:
    """The tokens of a data set as a stage reads them, those that it learns in colour.

    Reads and encodes as the stage does: what is shown is what is trained.
    """

    data: str
    """file of rows, as for the stage"""
    model: str
    """Hugging Face directory whose tokenizer and chat template are used"""
    task: Literal["sft", "reward", "prompts"] = "sft"
    """which stage's reading: sft, pairs of reward, or the prompts of ppo and grpo"""
    train_on: TrainOn = "last-answer"
    """which answers of a conversation are learnt (sft)"""
    chat_template: str | None = None
    """Jinja file instead of the model's chat template (sft)"""
    prompt_column: str = "prompt"
    """column of prompts (sft, prompts)"""
    completion_column: str | None = None
    """column of answers; without it, completion or response (sft)"""
    unusable: Literal["fail", "drop"] = "fail"
    """what happens to rows that cannot be used: unusable-rows of sft, unusable-pairs of
    reward, unusable-prompts of ppo and grpo"""
    max_tokens: int = 256
    """longest sequence, in tokens: max-tokens of sft and reward, max-prompt-tokens of
    ppo and grpo"""
    overlong: Overlong = "drop"
    """what happens to longer sequences"""
    limit: int = 3
    """examples shown; all are counted"""
    html: str | None = None
    """file to write the examples to as a page, in colour"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_positive(max_tokens=self.max_tokens, limit=self.limit)
        task = f"does nothing under task={self.task}; leave it out"
        sft, reward = self.task == "sft", self.task == "reward"
        for flag, value, default, is_used in (
            ("train-on", self.train_on, "last-answer", sft),
            ("chat-template", self.chat_template, None, sft),
            ("completion-column", self.completion_column, None, sft),
            ("prompt-column", self.prompt_column, "prompt", not reward),
        ):
            check(is_used or value == default, flag, value, task)

    def sft_config(self) -> SFTConfig:
        """What `sft` would be told."""
        return SFTConfig(
            run_dir=NO_RUN,
            data=self.data,
            model=self.model,
            train_on=self.train_on,
            chat_template=self.chat_template,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            unusable_rows=self.unusable,
            max_tokens=self.max_tokens,
            overlong=self.overlong,
        )

    def reward_config(self) -> RewardConfig:
        """What `reward` would be told."""
        return RewardConfig(
            run_dir=NO_RUN,
            data=self.data,
            model=self.model,
            unusable_pairs=self.unusable,
            max_tokens=self.max_tokens,
            overlong=self.overlong,
        )

    def policy_config(self) -> PolicyConfig:
        """What `ppo` and `grpo` would be told of their prompts."""
        return PolicyConfig(
            run_dir=NO_RUN,
            reward_model=NO_RUN,
            data=self.data,
            policy=self.model,
            prompt_column=self.prompt_column,
            unusable_prompts=self.unusable,
            max_prompt_tokens=self.max_tokens,
            overlong=self.overlong,
        )
