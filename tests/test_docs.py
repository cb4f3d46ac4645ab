"""Every Python example of every page in `docs/` runs, and its tables are complete.

A block fenced as `python` is run; other fences are not. The first block of a page is
its program; each later block runs on its own, on the names that the program left.
"""

import ast
import contextlib
import functools
import inspect
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import Experience, ScoreMoments

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """The examples of a page, each moved down to the line at which it stands there."""
    text = (DOCS / page).read_text("utf-8")
    return ["\n" * text.count("\n", 0, m.start(1)) + m[1] for m in FENCE.finditer(text)]


EXAMPLES = {
    page.name: found
    for page in sorted(DOCS.glob("*.md"))
    if (found := blocks(page.name))
}
LOOP = "your-own-loop.md"


def run(code, page, names):
    """What the code prints, and the names it leaves."""
    names, printed = dict(names), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(DOCS / page), "exec"), names)
    return printed.getvalue(), names


@functools.cache
def program(page):
    return run(EXAMPLES[page][0], page, {})


@functools.cache
def after_program(page, number):
    return run(EXAMPLES[page][number], page, program(page)[1])


def example(containing):
    """The names after the one block of the loop's page that contains this."""
    (number,) = (i for i, code in enumerate(EXAMPLES[LOOP]) if containing in code)
    return after_program(LOOP, number)[1]


def test_there_are_examples():
    assert len(EXAMPLES[LOOP]) == 22


def test_every_function_is_called_on_the_page():
    calls = {
        node.func.id
        for code in EXAMPLES[LOOP]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    functions = {n for n in rlhf_jax.__all__ if inspect.isfunction(vars(rlhf_jax)[n])}
    assert functions - calls == set()


def test_every_estimator_and_surrogate_of_the_page_is_finite():
    for containing, name in (
        ("remax_advantages(", "per_token"),
        ("sapo_loss(", "surrogates"),
    ):
        for key, array in example(containing)[name].items():
            assert array.shape == (64, 8) and np.isfinite(array).all(), key
            # The best answers of these groups have equals: none adds to the best.
            assert np.any(array) or key == "pass@k", key


def test_the_whole_loss_is_its_parts():
    names = example("for_critic")
    parts = names["for_actor"] + 0.5 * names["for_critic"]
    np.testing.assert_allclose(names["loss_value"], parts, rtol=1e-6)


def test_no_example_escapes():
    # Indented, or with a word more behind `python`, a block would not be run.
    for page in DOCS.glob("*.md"):
        fences = re.findall(r"^[ \t]*(?:```|~~~) *py.*$", page.read_text("utf-8"), re.M)
        assert fences == ["```python"] * len(EXAMPLES.get(page.name, []))


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, n) for page, found in EXAMPLES.items() for n in range(len(found))],
)
def test_example_runs(page, number):
    printed, names = program(page) if number == 0 else after_program(page, number)
    assert "nan" not in printed
    arrays = [x for x in jax.tree.leaves(list(names.values())) if is_float_array(x)]
    assert all(bool(jnp.isfinite(x).all()) for x in arrays)


def is_float_array(x):
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)


def test_the_program_learns():
    printed, names = program(LOOP)
    first, last = map(float, re.findall(r"-?\d+\.\d", printed))
    assert first < 0
    assert last > 4  # eight repetitions without a stop are worth 4, the best is 7
    assert float(jnp.max(names["scores"])) <= 7


def test_another_estimator():
    names = example('"estimator": "k3"')
    log_ratio = np.where(names["mask"], names["old"] - names["ref"], 0.0)
    k3 = np.minimum(np.exp(-log_ratio) - 1 + log_ratio, 10.0)
    np.testing.assert_allclose(names["kl"], k3, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        names["rewards"].sum(axis=1),
        names["scores"] - 0.05 * k3.sum(axis=1),
        rtol=1e-4,
        atol=1e-5,
    )


def test_kl_in_the_loss_pulls_like_k2():
    names = example("straight_through")
    params, mask, ref = names["params"], names["mask"], names["ref"]

    def by_hand(params):
        new, _ = names["read_answers"](params, names["tokens"])
        half_square = jnp.where(mask, 0.5 * (new - ref) ** 2, 0.0).sum() / mask.sum()
        return names["loss"](params, *names["batch"]) + 0.05 * half_square

    want = jax.jit(jax.grad(by_hand))(params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        names["grads"],
        want,
    )


def test_adaptive_coefficient():
    names = example("adapt_kl_coef")
    k1 = np.where(names["mask"], names["old"] - names["ref"], 0.0).sum(axis=1).mean()
    error = min(max(k1 / 6.0 - 1.0, -0.2), 0.2)
    want = 0.05 * (1 + error * 64 / 10_000)
    np.testing.assert_allclose(names["kl_coef"], want, rtol=1e-5)
    assert names["kl_coef"] != np.float32(0.05)


def test_score_after_the_last_token():
    names = example("include_end_state")
    mask, rewards = np.asarray(names["mask"]), np.asarray(names["rewards"])
    ends = np.minimum(mask.sum(axis=1), mask.shape[1] - 1)
    states = np.arange(mask.shape[1]) <= ends[:, None]
    np.testing.assert_array_equal(names["states"], states)
    rows, finished = np.arange(len(mask)), ends == mask.sum(axis=1)
    # No KL in the state after the last token, and nothing to come after it.
    np.testing.assert_array_equal(
        rewards[rows, ends][finished], names["scores"][finished]
    )
    np.testing.assert_allclose(
        names["returns"][rows, ends], rewards[rows, ends], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(names["advantages"][~mask], 0.0)

    new, old, target = (
        np.asarray(names[name])[states] for name in ("new_values", "values", "returns")
    )
    clipped = np.clip(new, old - 0.2, old + 0.2)
    errors = 0.5 * np.maximum((new - target) ** 2, (clipped - target) ** 2)
    np.testing.assert_allclose(names["value_loss"], errors.mean(), rtol=1e-4)


def test_soft_penalty():
    names = example("soft_overlong_penalty")
    ramp = [0, 0, 0, 0, 0, 0, -1 / 3, -2 / 3, -1]  # of 0 … 8 tokens
    want = names["scores"] + np.take(ramp, names["lengths"])
    np.testing.assert_allclose(names["ramped"], want, rtol=1e-5, atol=1e-6)


def test_normalized_scores():
    normalized = np.asarray(example("normalize_scores")["normalized"])
    np.testing.assert_allclose(normalized.mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(), 1.0, rtol=1e-4)


def test_two_lambdas():
    names = example("length_adaptive_lam")
    mask = np.asarray(names["mask"])
    rewards, values = np.asarray(names["rewards"]), np.where(mask, names["values"], 0.0)
    to_go = np.where(mask, rewards[:, ::-1].cumsum(axis=1)[:, ::-1], 0.0)
    np.testing.assert_allclose(names["returns"], to_go, rtol=1e-4, atol=1e-4)
    for row, length in enumerate(mask.sum(axis=1)):
        lam, advantage = 1 - 1 / max(0.5 * length, 1.0), 0.0
        for t in reversed(range(length)):
            after = values[row, t + 1] if t + 1 < length else 0.0
            advantage = rewards[row, t] + after - values[row, t] + lam * advantage
        np.testing.assert_allclose(
            names["advantages"][row, 0], advantage, rtol=1e-4, atol=1e-4
        )


def test_truncated_answers_end_with_a_value():
    (number,) = (i for i, x in enumerate(EXAMPLES[LOOP]) if "end_values" in x)
    cut = {"truncated": jnp.arange(64) % 3 == 0}  # the program's answers all stop
    _, names = run(EXAMPLES[LOOP][number], LOOP, program(LOOP)[1] | cut)
    truncated, mask = np.asarray(names["truncated"]), np.asarray(names["mask"])
    kl = 0.05 * (np.asarray(names["old"]) - np.asarray(names["ref"]))
    for row, end in enumerate(mask.sum(axis=1) - 1):
        # R = A + V = r + V(end), and one of the two is there: a score, or an end.
        worth = names["at_end"][row] if truncated[row] else names["scores"][row]
        np.testing.assert_allclose(
            names["returns"][row, end], worth - kl[row, end], rtol=1e-4, atol=1e-4
        )
    assert names["only_finished"].sum() == mask[~truncated].sum()


def test_group_in_place_of_a_critic():
    names = example("group_advantages")
    scores = np.asarray(names["scores"]).reshape(-1, 8)
    assert (np.asarray(names["prompts"]).reshape(-1, 8).std(axis=1) == 0).all()
    want = scores - (scores.sum(axis=1, keepdims=True) - scores) / 7  # of the others
    np.testing.assert_allclose(
        names["advantages"][:, 0], want.reshape(-1), rtol=1e-4, atol=1e-5
    )
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(names["grads"])) > 0


def test_other_surrogates():
    names = example("cispo_loss")
    padding = ~np.asarray(names["mask"])
    assert padding.any()
    np.testing.assert_array_equal(names["cispo"][padding], 0.0)
    np.testing.assert_array_equal(names["gspo"][padding], 0.0)
    ratio = np.where(padding, 1.0, np.exp(names["new"] - names["old"]))
    gain = -ratio * names["advantages"]
    bounded = -np.clip(ratio, 0.8, 1.28) * names["advantages"]
    np.testing.assert_allclose(
        np.where(padding, 0.0, names["higher"]),
        np.where(padding, 0.0, np.maximum(gain, bounded)),
        rtol=1e-4,
        atol=1e-6,
    )
    assert names["gspo_mean"].shape == ()


def test_one_model_needs_no_importance_weights():
    names = example("sampler_weights")
    want = np.where(names["mask"], 1.0, 0.0)
    np.testing.assert_allclose(names["weights"], want, rtol=1e-4)


def test_a_surrogate_of_ones_own():
    names = example("log_ratio_loss")
    mask = np.asarray(names["mask"])
    moved = np.clip(np.asarray(names["new"]) - names["old"], -0.5, 0.5)
    want = -(np.asarray(names["advantages"]) * moved)[mask].mean()
    metrics = names["metrics"]
    np.testing.assert_allclose(metrics["policy_loss"], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        names["loss_value"],
        metrics["policy_loss"] + metrics["value_loss"],
        rtol=1e-5,
        atol=1e-6,
    )


def test_estimators_of_ones_own():
    names = example("from_the_critic_alone")
    mask = np.asarray(names["mask"])
    advantages = np.asarray(names["experience"].advantages)[mask]
    np.testing.assert_allclose(advantages.mean(), 0.0, atol=1e-5)  # whitened after it
    np.testing.assert_allclose(advantages.std(), 1.0, rtol=1e-4)
    kl = np.where(mask, np.asarray(names["old"]) - names["ref"], 0.0)
    worth = (np.asarray(names["scores"]) - 0.05 * kl.sum(axis=1)).reshape(-1, 8)
    gain = (worth - np.median(worth, axis=1, keepdims=True)).reshape(-1, 1)
    np.testing.assert_allclose(
        names["group_experience"].advantages,
        np.where(mask, gain, 0.0),
        rtol=1e-4,
        atol=1e-4,
    )


def test_whole_method():
    names = example("method = trl()")
    experience, mask = names["experience"], np.asarray(names["mask"])
    advantages = np.asarray(experience.advantages)[mask]
    np.testing.assert_allclose(advantages.mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(advantages.std(ddof=1), 1.0, rtol=1e-4)
    # TRL trains the critic in the state after the last token too.
    ends = np.minimum(mask.sum(axis=1) + 1, mask.shape[1])
    np.testing.assert_array_equal(experience.value_mask.sum(axis=1), ends)
    # REINFORCE++ whitens over the tokens of the batch, without the 1 of n − 1.
    advantages = np.asarray(names["without_critic"].advantages)[mask]
    np.testing.assert_allclose(advantages.mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(advantages.std(), 1.0, rtol=1e-4)
    of_actors = names["actor_grads"].actor
    for network in (names["grads"].actor, names["grads"].critic, of_actors):
        assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(network))


ROW = re.compile(r"^\| `(\w+)\((.*?)\)` \| (?:`(.*?) ?→ (.*?)` \| )?.+ \|$", re.M)
ROWS = {row[0]: row[1:] for row in ROW.findall((DOCS / LOOP).read_text("utf-8"))}
FUNCTIONS = [name for name in ROWS if name[0].islower()]


def test_table_has_every_public_name_once():
    names = [row[0] for row in ROW.findall((DOCS / LOOP).read_text("utf-8"))]
    assert sorted(names) == sorted(rlhf_jax.__all__)


@pytest.mark.parametrize("name", ROWS)
def test_table_has_the_arguments_without_default(name):
    parameters = inspect.signature(getattr(rlhf_jax, name)).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    if name in FUNCTIONS:
        positional = [p.name for p in required if p.kind != p.KEYWORD_ONLY]
        keywords = [p.name for p in required if p.kind == p.KEYWORD_ONLY]
        want = positional + (["*", *keywords] if keywords else [])
    else:
        want = [p.name for p in required]  # a record's are all keywords
    assert [argument for argument in ROWS[name][0].split(", ") if argument] == want


SIZES = {"B": 4, "T": 6, "S": 8, "V": 5, "D": 3, "N": 7, "G": 2, "K": 9}
DTYPES = {"": jnp.float32, "int": jnp.int32, "bool": jnp.bool_}
KEYWORDS = {
    "stop_ids": 0,
    "target_kl": 6.0,
    "horizon": 10,
    "num_episodes": 4,
    "penalty": 1.0,
    "limit": 6,
    "buffer": 2,
    "kl_coef": 0.1,
    "n": 2,
    "num_samples": 8,
    "k": 2,
    "mask": jnp.ones((7, 9), bool),
    "key": jax.random.key(0),
    "num_minibatches": 2,
}
# Those without a default, and what the critic's losses ask for.
EXPERIENCE = {
    "mask": "bool [B,T]",
    "old_logprobs": "[B,T]",
    "advantages": "[B,T]",
    "old_values": "[B,T]",
    "returns": "[B,T]",
}


def parse(text):
    """A cell's arguments: shapes, sizes, and records by name."""
    return [x.strip() for x in re.split(r",(?![^\[]*\])", text) if x.strip()]


def argument(text):
    """An array without data, an int, a key or a record, as the table describes it."""
    if text in SIZES:
        return SIZES[text]
    if text == "key":
        return jax.random.key(0)
    if text == "ScoreMoments":
        return ScoreMoments(count=0.0, mean=0.0, squares=0.0)
    if text == "Experience":
        return Experience(**{name: argument(x) for name, x in EXPERIENCE.items()})
    dtype, dims = re.fullmatch(r"(\w*) ?\[(.*)\]", text).groups()
    shape = tuple(SIZES[d] for d in dims.split(",") if d)
    return jax.ShapeDtypeStruct(shape, DTYPES[dtype])


def describe(result):
    """A result as the table would write it."""
    if not isinstance(result, jax.ShapeDtypeStruct):
        return type(result).__name__
    letters = {size: letter for letter, size in SIZES.items()}
    dtype = next(name for name, d in DTYPES.items() if d == result.dtype)
    shape = ",".join(letters[size] for size in result.shape)
    return f"{dtype} [{shape}]".strip()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_table_has_the_shapes(name):
    signature, before, after = ROWS[name]
    function = getattr(rlhf_jax, name)
    keywords = {k: KEYWORDS[k] for k in signature.partition("*, ")[2].split(", ") if k}
    arguments = [argument(text) for text in parse(before)]
    static = {i: x for i, x in enumerate(arguments) if isinstance(x, int)}
    traced = [x for i, x in enumerate(arguments) if i not in static]

    def call(*arrays):
        rest = iter(arrays)
        return function(
            *(static[i] if i in static else next(rest) for i in range(len(arguments))),
            **keywords,
        )

    result = jax.eval_shape(call, *traced)
    results = result if type(result) is tuple else (result,)
    assert [describe(r) for r in results] == parse(after)
