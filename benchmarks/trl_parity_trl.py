"""TRL in `trl_parity.py`: its own trainer and loop, with all computed quantities.

Run by the peers' interpreter, not manually. The trainer is unmodified: the quantities
are local variables of its `train()`, read in its callback at the end of an update.
Models before and after are saved as Hugging Face directories.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

from peer import Turns
from shape import Shape

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch_models import make_config
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

RECORDED = (
    "queries",
    "responses",
    "sequence_lengths",
    "scores",
    "logprobs",
    "ref_logprobs",
    "values",
    "rewards",
    "advantages",
    "returns",
    "padding_mask",
    "padding_mask_p1",
    "pg_loss_stats",
    "vf_loss_stats",
    "approxkl_stats",
    "pg_clipfrac_stats",
    "vf_clipfrac_stats",
)
"""Tensors of `PPOTrainer.train()`."""


def train_locals() -> dict[str, Any]:
    """The local variables of the trainer's running `train()`."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not PPOTrainer.train.__code__:
        frame = frame.f_back
    if frame is None:
        raise RuntimeError("PPOTrainer.train() is not running")
    return frame.f_locals


class Record(TrainerCallback):
    """Waits for its turn before every update and records what it computed."""

    def __init__(self, turns: Turns, directory: Path):
        self.turns = turns
        self.directory = directory
        self.updates = 0
        self.steps: list[list[np.ndarray]] = []  # rows by optimizer step, microbatch
        self.pending: list[np.ndarray] = []
        register_optimizer_step_post_hook(self._end_step)
        self._forward = ppo_trainer.forward
        ppo_trainer.forward = self._watched_forward

    def _watched_forward(self, *args):
        if torch.is_grad_enabled():  # not one of the scoring passes
            self.pending.append(np.array(train_locals()["micro_batch_inds"]))
        return self._forward(*args)

    def _end_step(self, *_) -> None:
        self.steps.append(self.pending)
        self.pending = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Ready: nothing has been computed yet."""
        versions = {m.__name__: m.__version__ for m in (trl, torch, transformers)}
        self.turns.report({"versions": versions})
        self.turns.wait()

    def on_step_end(self, args, state, control, **kwargs):
        """End of an update."""
        if self.pending:
            raise RuntimeError("the update ended with gradients that no step took")
        self.updates += 1
        found = train_locals()
        arrays = {name: found[name].detach().numpy() for name in RECORDED}
        # Fails if the steps, or their microbatches, are of unequal sizes.
        arrays["steps"] = np.array(self.steps)
        self.steps = []
        np.savez(self.directory / f"update-{self.updates}.npz", **arrays)
        trained = found["model"]
        trained.policy.save_pretrained(self.directory / f"actor-{self.updates}")
        trained.value_model.save_pretrained(self.directory / f"critic-{self.updates}")
        self.turns.report({"update": self.updates})
        self.turns.wait()


def make_models(shape: Shape, directory: Path) -> dict[str, Any]:
    """Four networks with different weights, saved as `actor-0` and so on."""
    config = make_config(shape)
    language = transformers.AutoModelForCausalLM
    scorer = transformers.AutoModelForSequenceClassification
    classes = {
        "actor": language,
        "reference": language,
        "critic": scorer,
        "reward": scorer,
    }
    made = {}
    for name, kind in classes.items():
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases and norms too, which otherwise start at 0 and 1, where a
                # mistake with them would not show.
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(directory / f"{name}-0")
        made[name] = model
    return made


def make_tokenizer(
    vocab_size: int, *, stop_id: int, pad_id: int
) -> PreTrainedTokenizerFast:
    """The trainer wants one, for its stop token and its padding.

    TRL finds padding by its id, and a response ends where the policy samples that id.
    So it is outside the vocabulary.
    """
    ids = {str(i): i for i in range(vocab_size)} | {"[PAD]": pad_id}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="0")),
        pad_token="[PAD]",
        eos_token=str(stop_id),
        padding_side="left",
    )


def make_prompts(shape: Shape, count: int) -> list[list[int]]:
    """Prompts of 2 tokens to the shape's length, the stop token among them."""
    lengths = torch.randint(2, shape.prompt + 1, (count,)).tolist()
    return [torch.randint(shape.vocab_size, (n,)).tolist() for n in lengths]


def main() -> None:
    """Trains until the parent closes the pipe."""
    turns = Turns()
    settings = json.loads(sys.argv[1])
    shape = Shape(**settings["shape"])
    directory = Path(settings["directory"])
    warnings.simplefilter("ignore")
    # The trainer's own seed reaches torch alone; its minibatches come from NumPy.
    transformers.set_seed(settings["trainer"]["seed"])
    networks = make_models(shape, directory)
    prompts = make_prompts(shape, settings["num_prompts"])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(directory / "trainer"),
            stop_token="eos",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings["trainer"],
        ),
        processing_class=make_tokenizer(
            shape.vocab_size, stop_id=settings["stop_id"], pad_id=settings["pad_id"]
        ),
        model=networks["actor"],
        ref_model=networks["reference"],
        reward_model=networks["reward"],
        value_model=networks["critic"],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[Record(turns, directory)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    main()
