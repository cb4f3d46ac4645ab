"""The options of `rlhf-jax inspect` and `rlhf-jax show-data`.

The string below each field is its command-line help.
"""

import dataclasses
from typing import Any, Literal

from rlhf_jax.algo.options import check, require_defaults
from rlhf_jax.config.adapters import LoraConfig
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.limits import check_numbers
from rlhf_jax.config.policy import PolicyConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import (
    Dtype,
    MeshConfig,
    RunConfig,
    check_positive,
)
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.data.encoding import Overlong
from rlhf_jax.data.row_forms import TrainOn

Stage = Literal["sft", "reward", "ppo", "grpo"]
STAGES: dict[Stage, type[RunConfig]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Describe a model and the memory that each training stage needs per device.

    `rlhf-jax inspect DIRECTORY`. No weights are loaded. Parameters, optimizer state and
    frozen models are counted from shapes and shardings; activations and the KV cache
    are what the compiler plans for the actual programs, on the local kind of device. A
    mesh larger than the available devices is simulated on CPU. Reward model, critic and
    reference are assumed to have the model's shape.
    """

    model: str
    """Hugging Face directory, or name on the Hub"""
    stages: tuple[Stage, ...] = ("sft", "reward", "ppo", "grpo")
    """stages to plan memory for"""
    compile: bool = True
    """include the compiler's plan for activations and KV cache, which may take minutes
    for a large model"""
    batch_size: int | None = None
    """sequences, pairs or responses per step; None: the default of each stage"""
    microbatches: int | None = None
    """gradient accumulation steps per minibatch"""
    minibatches: int | None = None
    """optimizer steps per epoch (ppo, grpo)"""
    group_size: int | None = None
    """responses per prompt (grpo)"""
    max_tokens: int | None = None
    """maximum sequence length (sft, reward)"""
    max_prompt_tokens: int | None = None
    """maximum prompt length (ppo, grpo)"""
    max_new_tokens: int | None = None
    """maximum response length (ppo, grpo)"""
    undo_updates: bool = True
    """keep a copy of the trainable state during updates of several optimizer steps
    (ppo, grpo)"""
    critic_trunk: Literal["own", "shared"] = "own"
    """a separate critic network, or a value head on the policy (ppo)"""
    ensemble: int = 0
    """reward models besides the first (ppo, grpo)"""
    dtype: Dtype = "float32"
    """dtype of activations and frozen models; trainable parameters are float32"""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """low-rank adapters"""
    remat: bool = False
    """recompute activations in the backward pass"""
    scan_layers: bool = False
    """run the blocks under a scan: deep models compile faster"""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """device mesh"""
    json: bool = False
    """print JSON; progress goes to stderr"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self)
        check(bool(self.model), "model", self.model, "name a directory")
        check(bool(self.stages), "stages", self.stages, "name at least one stage")
        check(
            self.lora.adapter is None,
            "lora.adapter",
            self.lora.adapter,
            "is not loaded here; set lora.rank and lora.targets instead",
        )
        self.mesh.validate("mesh")
        why = "must be 0 or more"
        check(self.ensemble >= 0, "ensemble", self.ensemble, why)
        if "ppo" not in self.stages:
            require_defaults(self, "", "critic_trunk", why="has no effect without ppo")
            if "grpo" not in self.stages:
                why = "has no effect without ppo or grpo"
                require_defaults(self, "", "ensemble", "undo_updates", why=why)
        for stage in self.stages:
            self.of_stage(stage).validate()

    def of_stage(self, stage: Stage) -> RunConfig:
        """The configuration that the stage's own command would use."""
        given: dict[str, Any] = vars(self) | {
            "run_dir": self.model,  # not read, and neither are data
            "data": self.model,
            "policy": self.model,
            # Two models of the same shape: with one name, adapters would share arrays.
            "reward_model": f"{self.model} (reward model)",
            "ensemble": tuple(
                f"{self.model} (reward model {2 + i})" for i in range(self.ensemble)
            ),
        }
        config = STAGES[stage]
        fields = {field.name for field in dataclasses.fields(config)}
        return config(
            **{
                name: value
                for name, value in given.items()
                if name in fields and value is not None
            }
        )


NO_RUN = "-"
"""Placeholder for the run directory and reward model, which `show-data` ignores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowDataConfig:
    """Show the tokens of a dataset, with those that are trained on in color.

    Rows are read and encoded exactly as in training.
    """

    data: str
    """data file, as for the stage"""
    model: str
    """Hugging Face directory of the tokenizer and chat template"""
    task: Literal["sft", "reward", "prompts"] = "sft"
    """read the data as sft, as reward pairs, or as prompts of ppo and grpo"""
    train_on: TrainOn = "last-answer"
    """assistant turns that are trained on (sft)"""
    chat_template: str | None = None
    """Jinja file that replaces the model's chat template (sft)"""
    prompt_column: str = "prompt"
    """column of prompts (sft, prompts)"""
    completion_column: str | None = None
    """column of responses; None: completion or response (sft)"""
    unusable: Literal["fail", "drop"] = "fail"
    """how to handle unusable rows: unusable-rows of sft, unusable-pairs of reward,
    unusable-prompts of ppo and grpo"""
    max_tokens: int = 256
    """maximum sequence length: max-tokens of sft and reward, max-prompt-tokens of ppo
    and grpo"""
    overlong: Overlong = "drop"
    """how to handle longer sequences"""
    limit: int = 3
    """number of examples to show; all are counted"""
    html: str | None = None
    """HTML file to write the highlighted examples to"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self)
        check_positive(max_tokens=self.max_tokens, limit=self.limit)
        unused = ["train_on", "chat_template", "completion_column"]
        if self.task == "reward":
            unused.append("prompt_column")
        if self.task != "sft":
            why = f"has no effect with task={self.task}"
            require_defaults(self, "", *unused, why=why)

    def sft_config(self) -> SFTConfig:
        """The equivalent options of `sft`."""
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
        """The equivalent options of `reward`."""
        return RewardConfig(
            run_dir=NO_RUN,
            data=self.data,
            model=self.model,
            unusable_pairs=self.unusable,
            max_tokens=self.max_tokens,
            overlong=self.overlong,
        )

    def policy_config(self) -> PolicyConfig:
        """The equivalent prompt options of `ppo` and `grpo`."""
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
