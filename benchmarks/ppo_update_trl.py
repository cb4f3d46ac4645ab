"""TRL in `ppo_update.py`: its own trainer and loop, one update per turn.

Run by the peers' interpreter, not manually. Pauses between updates, where the trainer
calls `on_step_end`; a turn lasts until the next such call, so it includes everything
the trainer does for an update, without logging, checkpoints or sample tables.
"""

# pyright: reportMissingImports=false

import json
import os
import resource
import sys
import tempfile
import time
import warnings

from peer import Turns
from shape import Shape

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch_models import make_config, synchronize
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Alternate(TrainerCallback):
    """Waits for its turn before every update and reports after it."""

    def __init__(self, turns: Turns, shape: Shape):
        self.turns = turns
        self.shape = shape
        self.optimizer_steps = 0
        self.rollout_seconds = 0.0
        self.response_tokens = 0
        register_optimizer_step_post_hook(self._count_step)
        self._generate = ppo_trainer.batch_generation
        ppo_trainer.batch_generation = self._timed_generation

    def _count_step(self, *_) -> None:
        self.optimizer_steps += 1

    def _timed_generation(self, model, queries, batch_size, pad_token_id, config):
        start = time.perf_counter()
        sequences, logits = self._generate(
            model, queries, batch_size, pad_token_id, config
        )
        synchronize()
        self.rollout_seconds = time.perf_counter() - start
        responses = sequences[:, queries.shape[1] :]
        self.response_tokens = int((responses != pad_token_id).sum())
        return sequences, logits

    def _begin(self) -> None:
        self.turns.wait()
        self.steps_before = self.optimizer_steps
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        """Ready: nothing has been computed yet."""
        self.turns.report(
            {
                "versions": {m.__name__: m.__version__ for m in (trl, torch)}
                | {"transformers": transformers.__version__},
                "device": str(args.device),
                "threads": torch.get_num_threads(),
            }
        )
        self._begin()

    def on_step_end(self, args, state, control, **kwargs):
        """End of one update and start of the next."""
        synchronize()
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cuda = torch.cuda.is_available()
        self.turns.report(
            {
                "update_s": time.perf_counter() - self.start,
                "rollout_s": self.rollout_seconds,
                "optimizer_steps": self.optimizer_steps - self.steps_before,
                "response_tokens": self.response_tokens,
                "peak_rss_bytes": rss if sys.platform == "darwin" else rss * 1024,
                "device_peak_bytes": torch.cuda.max_memory_allocated()
                if cuda
                else None,
            }
        )
        self._begin()


def make_models(shape: Shape) -> tuple[transformers.PreTrainedModel, ...]:
    """Policy, reference, value model and reward model, all separate."""
    config = make_config(shape)
    policy = transformers.AutoModelForCausalLM.from_config(config)
    reference = transformers.AutoModelForCausalLM.from_config(config)
    reference.load_state_dict(policy.state_dict())
    scorer = transformers.AutoModelForSequenceClassification
    return policy, reference, scorer.from_config(config), scorer.from_config(config)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The trainer wants one; pad and EOS lie outside the vocabulary it samples from.

    TRL finds padding by its id. One that the policy can sample would cut responses
    short.
    """
    ids = {str(i): i for i in range(vocab_size)}
    ids |= {"[PAD]": vocab_size, "[EOS]": vocab_size + 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="0")),
        pad_token="[PAD]",
        eos_token="[EOS]",
    )


def main() -> None:
    """Trains until the parent closes the pipe."""
    turns = Turns()
    settings = json.loads(sys.argv[1])
    shape = Shape(**settings["shape"])
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    policy, reference, value_model, reward_model = make_models(shape)
    prompts = torch.randint(shape.vocab_size, (8 * shape.batch, shape.prompt))
    with tempfile.TemporaryDirectory() as directory:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=directory,
                total_episodes=shape.batch * settings["updates"],
                # With accumulation TRL takes one step an epoch, not one a minibatch.
                per_device_train_batch_size=shape.batch,
                gradient_accumulation_steps=1,
                num_mini_batches=shape.minibatches,
                num_ppo_epochs=shape.epochs,
                local_rollout_forward_batch_size=shape.batch,
                response_length=shape.response,
                temperature=1.0,
                gradient_checkpointing=False,
                bf16=shape.dtype == "bfloat16",
                use_cpu=settings["cpu"],
                num_sample_generations=0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
            ),
            processing_class=make_tokenizer(shape.vocab_size),
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=value_model,
            train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
            callbacks=[Alternate(turns, shape)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
