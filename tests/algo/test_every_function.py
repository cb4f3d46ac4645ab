"""Every function that `rlhf_jax` exports, under every way of calling it.

The calls and what each function promises are in `function_cases.py`. Results are
compared with those of plain calls, which the other files hold against hand arithmetic.
One compiled program computes all cases of a check.
"""

import inspect
import operator
from contextlib import nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algo.function_cases import CASES, WITHOUT_ARRAYS
from algo.function_inputs import SHARDS, SHARED, B, T, arrays, one_token
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rlhf_jax as rj

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
equal = partial(jax.tree.map, np.testing.assert_array_equal)
close = partial(jax.tree.map, partial(np.testing.assert_allclose, **TOLERANCE))


def each(check, cases=CASES):
    """Runs a check on every case, and fails with the names of those that fail."""
    failures = []
    for name, case in cases.items():
        try:
            check(name, case)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    if failures:
        pytest.fail("\n\n".join([f"{len(failures)} of {len(cases)} cases:", *failures]))


def where(promise):
    """The cases for which it holds."""
    return {name: case for name, case in CASES.items() if promise(case)}


def program(fn, cases=CASES):
    """`fn(case, …)` of all cases, by name."""

    def run(*args):
        results, errors = {}, []
        for name, case in cases.items():
            try:
                results[name] = fn(case, *args)
            except Exception as error:
                error.add_note(f"in the case {name!r}")
                errors.append(error)
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {len(cases)} cases", errors)
        return results

    return run


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def read(case, x):
    return {name: x[name] for name in case.reads.split()}


def values(case, x, **options):
    return case.call(read(case, x), **case.options | options)


def values_and_slopes(case, x, **options):
    """Results, and the gradient of a number made of them in every float that is read.

    The number is a sum over rows, alike for all of them.
    """
    arrays_read = read(case, x)
    floats = {k: v for k, v in arrays_read.items() if is_float(v)}

    def number(floats):
        result = case.call(arrays_read | floats, **case.options | options)
        terms = [y for y in jax.tree.leaves(real(case, result, x)) if is_float(y)]
        if not callable(case.parts):  # those have to add up
            terms = [jnp.sin(2.0 * y + 0.3) for y in terms]
        return sum((jnp.sum(y) for y in terms), jnp.float32(0)), result

    slopes, result = jax.grad(number, has_aux=True)(floats)
    return result, slopes


def real(case, results, x):
    """Results without those that the docstring leaves to the caller to mask."""
    if case.padding == "unread":
        return results
    xp = jnp if isinstance(x["mask"], jax.Array) else np

    def select(y):
        if y.shape[:2] != x["mask"].shape:
            return y
        mask = x["mask"].reshape(*x["mask"].shape, *[1] * (y.ndim - 2))
        return xp.where(mask, y, xp.zeros_like(y))

    return jax.tree.map(select, results)


compiled_values = jax.jit(program(values))
compiled_slopes = jax.jit(program(values_and_slopes))


@cache
def plain_results():
    return jax.device_get(compiled_values(arrays()))


@cache
def plain_slopes():
    return jax.device_get(compiled_slopes(arrays()))


def functions():
    return {name for name in rj.__all__ if inspect.isfunction(getattr(rj, name))}


def test_every_function_has_a_case():
    covered = {name.partition(",")[0] for name in CASES} | WITHOUT_ARRAYS.keys()
    missing, unknown = functions() - covered, covered - functions()
    file = "tests/algo/function_cases.py"
    assert not missing, f"no case: {sorted(missing)}; add one to CASES in {file}"
    assert not unknown, f"no export of rlhf_jax: {sorted(unknown)}; see CASES in {file}"


def test_eager_is_jit():
    want = plain_results()
    each(lambda name, case: close(values(case, arrays()), want[name]))


def test_vmap_is_a_loop():
    batches = [arrays(seed) for seed in (3, 4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    got = jax.jit(jax.vmap(program(values)))(stacked)
    want = [compiled_values(x) for x in batches]

    def check(name, _):
        for i in range(2):
            close(jax.tree.map(operator.itemgetter(i), got[name]), want[i][name])

    each(check)


def spec(name):
    return P() if name in SHARED else P("data")


def test_rows_on_eight_devices_are_rows_on_one():
    """Rows are computed where they are; with totals handed in, parts add up."""
    cases = where(lambda case: case.parts == "rows" or callable(case.parts))
    mesh = jax.make_mesh((SHARDS,), ("data",), axis_types=(AxisType.Auto,))
    batch = arrays()

    def part(case, x, whole):
        given = case.local
        if callable(case.parts):
            given = case.parts(whole)
        result, slopes = values_and_slopes(case, x, **given)
        if callable(case.parts):
            result = jax.lax.psum(result, "data")
        return result, slopes

    def specs(case):
        slopes = {k: spec(k) for k in case.reads.split() if is_float(batch[k])}
        return P() if callable(case.parts) else P("data"), slopes

    run = jax.shard_map(
        program(part, cases),
        mesh=mesh,
        in_specs=({name: spec(name) for name in batch}, P()),
        out_specs={name: specs(case) for name, case in cases.items()},
    )
    masks = {name: batch[name] for name in ("mask", "value_mask")}
    got, want = jax.device_get(jax.jit(run)(batch, masks)), plain_slopes()

    def check(name, case):
        close(real(case, got[name], batch), real(case, want[name], batch))

    each(check, cases)


def test_whole_batches_spread_over_eight_devices():
    cases = where(lambda case: isinstance(case.parts, str) and case.parts != "rows")
    mesh = jax.make_mesh((SHARDS,), ("data",), axis_types=(AxisType.Auto,))
    spread = {
        k: jax.device_put(v, NamedSharding(mesh, spec(k))) for k, v in arrays().items()
    }
    got, want = jax.jit(program(values, cases))(spread), plain_results()
    each(lambda name, _: close(got[name], want[name]), cases)


def as_numpy(options, integer, floating):
    kinds = {int: integer, float: floating}
    return {k: kinds.get(type(v), lambda v: v)(v) for k, v in options.items()}


@pytest.mark.parametrize(
    ("wide", "integer", "floating"),
    [
        (True, np.int64, np.float64),
        (False, np.int64, np.float64),
        (False, np.int32, np.float32),
    ],
)
def test_numpy_numbers_and_64_bit_types(wide, integer, floating):
    def of_numbers(case, x):
        return values(case, x, **as_numpy(case.options, integer, floating))

    batch, want = arrays(), plain_results()
    # As users have it: strict promotion would refuse NumPy's scalars before any use.
    standard = jax.numpy_dtype_promotion("standard") if wide else nullcontext()
    with jax.enable_x64(wide), standard:
        got = jax.jit(program(of_numbers))(batch)

    def check(name, case):
        types = [x.dtype for x in jax.tree.leaves(got[name])]
        assert types == [x.dtype for x in jax.tree.leaves(want[name])]
        if not (wide and case.drawn_bits):
            close(got[name], want[name])

    each(check)


def cast(x, dtype):
    return {k: v.astype(dtype) if is_float(v) else v for k, v in x.items()}


def test_bfloat16_is_read_as_float32():
    low = cast(arrays(), jnp.bfloat16)
    got = jax.jit(program(values))(low)
    want = compiled_values(cast(low, jnp.float32))

    def check(name, case):
        for x in filter(is_float, jax.tree.leaves(got[name])):
            assert x.dtype == ("float32" if case.dtype == "float32" else "bfloat16")
        if case.dtype == "float32" and not case.rounds:
            close(got[name], want[name])

    each(check)


def test_one_row_of_one_token_or_none():
    def one(case, x):
        result, slopes = values_and_slopes(case, x, **case.one)
        return real(case, (result, slopes), x)

    run = jax.jit(program(one))
    for row, tokens in ((0, 1), (3, 0)):
        batch = one_token(arrays(), row)
        got = run(batch)
        assert int(batch["mask"].sum()) == tokens

        def check(name, case, got=got, tokens=tokens):
            result, _ = got[name]
            for x in jax.tree.leaves(got[name]):
                assert np.isfinite(x).all()
            if tokens == 0 and case.empty is not None:
                for x in jax.tree.leaves(result):
                    np.testing.assert_array_equal(x, case.empty)

        each(check)


def test_a_batch_without_tokens():
    batch = arrays(mask=np.zeros((B, T), bool))
    got = compiled_slopes(batch)

    def check(name, case):
        for x in jax.tree.leaves(real(case, got[name], batch)):
            assert np.isfinite(x).all()
        if case.empty is not None:
            for x in jax.tree.leaves(got[name][0]):
                np.testing.assert_array_equal(x, case.empty)

    each(check)


def test_padding_is_not_read():
    batch, nan = arrays(), plain_slopes()
    others = [
        jax.device_get(compiled_slopes(arrays(padding=padding, token=V)))
        for padding, V in ((np.inf, 7), (-np.inf, 10**6), (1e30, 3))
    ]

    def check(name, case):
        for x in jax.tree.leaves(real(case, nan[name], batch)):
            assert np.isfinite(x).all()
        for other in others:
            equal(*(real(case, y[name], batch) for y in (nan, other)))

    each(check)


def test_gradients_flow_where_they_are_promised():
    def check(name, case):
        promised = case.reads.split()[: case.slopes]
        for k, slope in real(case, plain_slopes()[name][1], arrays()).items():
            assert slope.any() == (k in promised), k

    each(check)


def test_second_derivatives_are_finite_and_agree():
    """Forward over reverse, and reverse over reverse, in one direction."""
    cases = where(lambda case: case.slopes and case.second == "finite")

    def both(case, x):
        floats = {k: x[k] for k in case.reads.split()[: case.slopes]}
        direction = {
            k: jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape)
            for k, v in floats.items()
        }

        def slopes(floats):
            found = values_and_slopes(case, x | floats)[1]
            return {k: found[k] for k in floats}

        def along(floats):
            found = real(case, slopes(floats), x)
            return sum(jnp.vdot(found[k], direction[k]) for k in floats)

        _, forward = jax.jvp(slopes, (floats,), (direction,))
        return real(case, (forward, jax.grad(along)(floats)), x)

    got = jax.jit(program(both, cases))(arrays())

    def check(name, case):
        forward, reverse = got[name]
        for x in jax.tree.leaves(forward):
            assert np.isfinite(x).all()
        close(forward, reverse)

    each(check, cases)
