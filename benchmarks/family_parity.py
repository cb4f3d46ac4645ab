"""Every family against its PyTorch class: outputs, gradients, responses, files.

    python benchmarks/family_parity.py

For each case of `family_cases.py`, a model with random weights is saved by
`transformers`, loaded here, and both are run. Errors are the largest absolute
difference over all real tokens; for gradients, relative to the largest entry of the
same tensor, or to a thousandth of the model's largest if that is more. Here rows are a
left-padded batch; there each runs alone, without padding.
"""

# pyright: reportMissingImports=false

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch
import transformers
from family_cases import CASES, Case
from safetensors.numpy import load_file

from rlhf_jax.algo.logprobs import token_logprobs
from rlhf_jax.algo.types import Prompts
from rlhf_jax.models import load_pretrained, save_pretrained
from rlhf_jax.models.callables import policy
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollout import generate

LENGTHS = (24, 15, 2, 1)
NUM_PROMPT, NUM_NEW = 8, 12
SHARD = "20KB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """Differences between the two."""

    logits: float
    hidden: float  # after the final norm
    values: float  # of a classifier, at every token
    scores: float  # of a classifier, at the last token
    gradients: float  # relative, worst tensor
    greedy: float  # share of identical tokens in greedy responses
    round_trip: bool  # load and save: the same tensors, bit for bit
    bfloat16: float  # our error of bfloat16 over theirs, root mean squares


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Left-padded rows; padding has ordinary ids."""
    width = max(LENGTHS)
    tokens = np.random.default_rng(7).integers(2, 48, (len(LENGTHS), width))
    mask = np.arange(width) >= width - np.array(LENGTHS)[:, None]
    return tokens.astype(np.int32), mask


def compare(case: Case, directory: Path) -> Parity:
    """Saves, loads and runs the models of one case."""
    theirs = random_model(transformers.AutoModelForCausalLM, case)
    theirs.save_pretrained(directory / "lm", max_shard_size=SHARD)
    module, params = load_pretrained(directory / "lm")
    tokens, mask = rows()
    outputs = [forward(theirs, row) for row in real(tokens, mask)]
    logits, hidden = jax.jit(
        lambda params: (
            module.apply({"params": params}, tokens, mask),
            module.apply({"params": params}, tokens, mask, method="hidden"),
        )
    )(params)
    values, scores = _heads(case, directory / "classifier")
    want = [out.logits for out in outputs]
    return Parity(
        logits=error(logits, want, mask),
        hidden=error(hidden, [out.hidden_states[-1] for out in outputs], mask),
        values=values,
        scores=scores,
        gradients=_gradients(theirs, module, params, directory / "gradients"),
        greedy=_greedy(case, theirs, module, params),
        round_trip=_round_trip(directory / "lm", module, params, directory / "again"),
        bfloat16=_bfloat16(theirs, directory / "lm", want),
    )


def scanned(module: Transformer) -> Transformer:
    """The module with its layers under a scan, which is compiled sooner."""
    return module.clone(scan_layers=True)


def random_model(auto_class: Any, case: Case) -> Any:
    """Every parameter drawn, also those that start at 0 or 1."""
    torch.manual_seed(0)
    config = case.make()
    config._attn_implementation = "eager"  # soft caps are nowhere else
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def real(tokens: np.ndarray, mask: np.ndarray) -> Iterator[torch.Tensor]:
    """Each row alone, without its padding, `[1, L]`."""
    for row, where in zip(tokens, mask, strict=True):
        yield torch.tensor(row[where]).long()[None]


def forward(model: Any, row: torch.Tensor) -> Any:
    """One row through a PyTorch model."""
    with torch.no_grad():
        return model(input_ids=row, output_hidden_states=True)


def error(ours: Any, theirs: list[torch.Tensor], mask: np.ndarray) -> float:
    """Largest absolute difference over real tokens."""
    ours = np.asarray(ours, np.float32)
    return max(
        float(np.abs(row[where] - want[0].float().numpy()).max())
        for row, where, want in zip(ours, mask, theirs, strict=True)
    )


def _heads(case: Case, directory: Path) -> tuple[float, float]:
    """Errors of values at every token, and of scores at the last."""
    auto_class = transformers.AutoModelForSequenceClassification
    theirs = random_model(auto_class, case)
    theirs.save_pretrained(directory, max_shard_size=SHARD)
    tokens, mask = rows()
    module, params = load_pretrained(directory, head="value")
    reward_model, reward_params = load_pretrained(directory, head="reward")
    values, scores = jax.jit(
        lambda params, reward_params: (
            scanned(module).apply({"params": params}, tokens, mask),
            scanned(reward_model).apply({"params": reward_params}, tokens, mask),
        )
    )(params, reward_params)
    outputs = [forward(theirs, row) for row in real(tokens, mask)]
    with torch.no_grad():
        want = [theirs.score(out.hidden_states[-1])[..., 0] for out in outputs]
    last = np.array([float(out.logits[0, 0]) for out in outputs])
    return error(values, want, mask), float(np.abs(np.asarray(scores) - last).max())


def _gradients(theirs: Any, module: Any, params: Any, directory: Path) -> float:
    """Of the mean loss of the next token, with respect to every parameter."""
    tokens, mask = rows()
    targets = mask[:, 1:] & mask[:, :-1]

    def loss(params):
        logits: Any = scanned(module).apply({"params": params}, tokens, mask)
        losses = -token_logprobs(logits[:, :-1], jnp.asarray(tokens[:, 1:]))
        return jnp.sum(jnp.where(targets, losses, 0.0)) / targets.sum()

    ours = jax.jit(jax.grad(loss))(params)
    theirs.zero_grad()
    total = torch.zeros(())
    for row in real(tokens, mask):
        logits = theirs(input_ids=row).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, row[0, 1:], reduction="sum"
        )
    (total / targets.sum()).backward()
    kept = [parameter.detach().clone() for parameter in theirs.parameters()]
    with torch.no_grad():  # the gradients as a checkpoint: read by the same rules
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
        theirs.save_pretrained(directory)
        for parameter, value in zip(theirs.parameters(), kept, strict=True):
            parameter.copy_(value)
    _, want = load_pretrained(directory)
    sizes = [float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want)]
    least = 1e-3 * max(sizes)  # biases of keys have a gradient of zero, and rounding
    return max(
        float(jnp.max(jnp.abs(a - b))) / max(size, least)
        for a, b, size in zip(
            jax.tree.leaves(ours), jax.tree.leaves(want), sizes, strict=True
        )
    )


def _greedy(case: Case, theirs: Any, module: Any, params: Any) -> float:
    """Share of identical tokens in greedy responses."""
    tokens, mask = rows()
    if case.one_length:  # of prompts past the original length, on which all depends
        prompts, lengths = tokens[:1, -20:], np.array([20], np.int32)
    else:
        prompts = tokens[:, -NUM_PROMPT:]
        lengths = np.minimum(mask.sum(1), NUM_PROMPT).astype(np.int32)
    call = policy(module)
    ours = jax.jit(
        lambda params, prompts: (
            generate(
                jax.random.key(0),
                params,
                prompts,
                prefill=call.prefill,
                decode=call.decode,
                max_new_tokens=NUM_NEW,
                stop_ids=(),
                temperature=0,
            ).responses
        )
    )(params, Prompts(tokens=jnp.asarray(prompts), lengths=jnp.asarray(lengths)))
    theirs.generation_config.eos_token_id = None  # never stop early
    answers = [
        theirs.generate(
            input_ids=torch.tensor(row[len(row) - length :]).long()[None],
            do_sample=False,
            max_new_tokens=NUM_NEW,
            pad_token_id=1,
        )[0, length:].numpy()
        for row, length in zip(prompts, lengths, strict=True)
    ]
    return float(np.mean(np.asarray(ours) == np.stack(answers)))


def _round_trip(source: Path, module: Any, params: Any, target: Path) -> bool:
    """Whether our files have the same tensors as theirs, and they can read ours."""
    save_pretrained(target, module, params, max_shard_bytes=20_000)
    theirs, ours = (
        {
            name: tensor
            for file in path.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for path in (source, target)
    )
    auto_class: Any = transformers.AutoModelForCausalLM
    _, info = auto_class.from_pretrained(target, output_loading_info=True)
    return (
        ours.keys() == theirs.keys()
        and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        and not any(info.values())
    )


def _bfloat16(theirs: Any, path: Path, want: list[torch.Tensor]) -> float:
    """Root mean square error of our bfloat16, over that of PyTorch's."""
    tokens, mask = rows()
    module, params = load_pretrained(path, dtype=jnp.bfloat16)
    logits = jax.jit(scanned(module).apply)({"params": params}, tokens, mask)
    logits = np.asarray(logits)
    exact = np.concatenate([x[0].numpy() for x in want])
    ours = np.concatenate([x[m] for x, m in zip(logits, mask, strict=True)])
    half = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    outputs = [forward(half, row).logits[0] for row in real(tokens, mask)]
    other = np.concatenate([x.float().numpy() for x in outputs])

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((x - exact) ** 2)))

    return rms(ours) / rms(other)


def table(found: dict[str, Parity]) -> str:
    """The results as Markdown."""
    lines = [
        "| case | logits | hidden | values | scores | gradients | greedy | round trip "
        "| bfloat16 |",
        "|---|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for name, x in found.items():
        lines.append(
            f"| {name} | {x.logits:.0e} | {x.hidden:.0e} | {x.values:.0e} "
            f"| {x.scores:.0e} | {x.gradients:.0e} | {100 * x.greedy:.0f} % "
            f"| {'exact' if x.round_trip else 'DIFFERS'} | {x.bfloat16:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description="every family against its PyTorch class"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    transformers.logging.disable_progress_bar()
    found = {}
    names = parser.parse_args().cases
    for number, name in enumerate(names, 1):
        print(f"{number}/{len(names)} {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as directory:
            found[name] = compare(CASES[name], Path(directory))
    timing.print_machine(timing.machine())
    print(table(found))
    rows = {name: dataclasses.asdict(parity) for name, parity in found.items()}
    timing.print_result(
        {"benchmark": "family_parity", "cases": rows, "machine": timing.machine()}
    )


if __name__ == "__main__":
    main()
