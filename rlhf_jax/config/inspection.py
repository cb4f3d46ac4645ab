"""The options of `rlhf-jax inspect`: flags, keys of the file, help.

The string below each field is its help on the command line.
"""

import dataclasses
from typing import Any, Literal

from rlhf_jax.algo.options import check
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.policy import PolicyConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import Dtype, LoraConfig, MeshConfig, Overlong, check_positive
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.data.row_forms import TrainOn

Stage = Literal["sft", "reward", "ppo", "grpo"]
StageConfig = SFTConfig | RewardConfig | PPOConfig | GRPOConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What a model is, and the memory that training it would take on each device.

    `rlhf-jax inspect DIRECTORY`. No weights are loaded. Parameters, optimizer and
    frozen models are counted from shapes and shardings; activations and the key/value
    cache are what the compiler plans for the real programs, on this machine's kind of
    device. A mesh of more devices than there are is simulated on CPU. Reward model,
    critic and reference are taken to have the same shape as the model.
    """

    model: str
    """Hugging Face directory, or name on the Hub"""
    stages: tuple[Stage, ...] = ("sft", "reward", "ppo", "grpo")
    """whose memory is worked out"""
    compile: bool = True
    """ask the compiler about activations and cache, which may take minutes for a large
    model; without it, only what is counted"""
    batch_size: int | None = None
    """sequences, pairs or answers per step; without it, the default of each stage"""
    microbatches: int | None = None
    """parts of a minibatch computed one after the other"""
    minibatches: int | None = None
    """optimizer steps per pass of ppo and grpo"""
    group_size: int | None = None
    """answers to a prompt in grpo"""
    max_tokens: int | None = None
    """longest sequence of sft and reward"""
    max_prompt_tokens: int | None = None
    """longest prompt of ppo and grpo"""
    max_new_tokens: int | None = None
    """longest answer of ppo and grpo"""
    dtype: Dtype = "float32"
    """of activations and of frozen models; trained parameters are float32"""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """low-rank adapters"""
    remat: bool = False
    """recompute activations in the backward pass"""
    scan_layers: bool = False
    """run the blocks under a scan: compiles faster for deep models"""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """devices"""
    json: bool = False
    """print JSON, and progress on standard error"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(bool(self.model), "model", self.model, "name a directory")
        check(bool(self.stages), "stages", self.stages, "name at least one stage")
        check(
            self.lora.adapter is None,
            "lora.adapter",
            self.lora.adapter,
            "give the rank and targets instead: nothing is loaded here",
        )
        self.mesh.validate("mesh")
        for stage in self.stages:
            self.of_stage(stage).validate()

    def of_stage(self, stage: Stage) -> StageConfig:
        """The configuration that the stage's own command would run with."""
        data = {"data": self.model, "run_dir": self.model}  # neither is touched
        shared = {
            name: vars(self)[name]
            for name in ("dtype", "lora", "remat", "scan_layers", "mesh")
        }
        sizes = self._given("batch_size", "microbatches")
        if stage in ("sft", "reward"):
            sizes |= self._given("max_tokens")
            config = SFTConfig if stage == "sft" else RewardConfig
            return config(model=self.model, **data, **shared, **sizes)
        models = {"policy": self.model, "reward_model": self.model}
        sizes |= self._given("minibatches", "max_prompt_tokens", "max_new_tokens")
        if stage == "ppo":
            return PPOConfig(**models, **data, **shared, **sizes)
        sizes |= self._given("group_size")
        return GRPOConfig(**models, **data, **shared, **sizes)

    def _given(self, *names: str) -> dict[str, Any]:
        return {
            name: vars(self)[name] for name in names if vars(self)[name] is not None
        }


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
