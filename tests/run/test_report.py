"""The report shows all that was logged, safely, in one file."""

import html.parser
import itertools
import json
import re

import jax
import pytest

from rlhf_jax.run.log_files import MetricsWriter, SamplesWriter
from rlhf_jax.run.report import (
    compare_samples,
    format_number,
    format_seconds,
    write_report,
)
from rlhf_jax.run.run_directory import open_run

NASTY = '<script>alert("x")</script> & {{ 7 * 7 }}'
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(html.parser.HTMLParser):
    """Text, attributes and nesting of a page, by an independent parser."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(tmp_path):
    config = {"seed": 17, "actor": {"learning_rate": 1e-6}, "note": NASTY}
    return open_run(tmp_path / "run", config, stage="ppo")


def write_metrics(run, rows):
    with MetricsWriter(run.metrics) as writer:
        for step, row in enumerate(rows):
            writer.write(step, row)


def report(run, **options):
    path = write_report(run.path, **options)
    assert path == run.report
    return path.read_text(encoding="utf-8")


def test_every_metric_is_charted_and_listed(run):
    names = [
        "reward/score_mean",
        "reward/score_std",
        "kl/sequence",
        "policy/clip_fraction",
        "value/clip_fraction",
        "value/surprise",
        "made_up/by_somebody",
    ]
    write_metrics(run, [dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.75)])
    text = report(run)
    charts = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    for name in names:
        assert sum(f">{name}<" in chart for chart in charts) == 1, name
        assert f"<td>{name}</td>" in text
    assert all("<svg" in chart for chart in charts)


def test_key_numbers_go_from_first_to_last(run):
    write_metrics(run, [{"kl/sequence": 0.25}, {"kl/sequence": 9.0}, {"eval/x": 1}])
    tile = re.search(r'<div class="tile.*?</div>', report(run), re.DOTALL)
    assert tile is not None
    text = " ".join("".join(Page(tile.group()).text).split())
    assert text == "KL per response9from 0.25"


def test_header_names_stage_steps_time_seed_and_versions(run):
    write_metrics(run, [{"time/step_seconds": 50.0}, {"time/step_seconds": 75.5}])
    facts = re.search(r"<dl.*?</dl>", report(run), re.DOTALL)
    assert facts is not None
    words = [text.strip() for text in Page(facts.group()).text if text.strip()]
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert told["Stage"] == "ppo"
    assert told["Steps"] == "2"
    assert told["Total step time"] == "2 min 6 s"  # 125.5 s, rounded half to even
    assert told["Seed"] == "17"
    assert told["jax"] == jax.__version__


def test_text_from_outside_is_escaped_everywhere(run):
    write_metrics(run, [{f"mine/{NASTY}": 1.0}])
    sample = {"prompt": NASTY, "response": NASTY, "score": None, NASTY: NASTY}
    with SamplesWriter(run.samples) as samples:
        samples.write(0, [sample])
    text = report(run, title=NASTY, notes=[NASTY], table=[{NASTY: NASTY}])
    page = Page(text)
    assert "script" not in page.tags
    shown = "".join(page.text)
    # Title twice, note, table 2, chart, metric, prompt, response, sample number 2,
    # configuration: each as it was written.
    assert shown.count(NASTY) >= 12


def test_page_needs_nothing_from_outside_and_is_well_formed(run):
    write_metrics(run, [{"train/loss": 2.0, "eval/loss": 3.0}, {"train/loss": 1.0}])
    text = report(run)
    page = Page(text)
    assert page.open == []
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("#"), (name, value)
    assert not {"link", "script", "iframe", "img", "object", "base"} & set(page.tags)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))
    assert run.path.as_posix() not in text


def test_ids_are_unique(run):
    write_metrics(run, [{"train/loss": 2.0, "train/accuracy": 2.0}] * 3)
    ids = [value for name, value in Page(report(run)).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_values_that_are_not_finite_are_counted(run):
    write_metrics(run, [{"train/loss": float("nan")}, {"train/loss": float("inf")}])
    text = report(run)
    assert "2 values not finite" in text
    assert "train/loss" in text


def test_table_and_notes_come_first(run):
    write_metrics(run, [{"train/loss": 2.0}])
    table = [{"model": "base", "score": 0.25}, {"model": "ppo", "score": 0.5, "KL": 3}]
    text = report(run, title="Quickstart", table=table, notes="One paragraph.")
    body = text[text.index("<h1") : text.index("</main")]
    shown = " ".join(Page(body).text).split()
    assert shown[0] == "Quickstart"
    start = shown.index("model")
    assert shown[start : start + 8] == "model score KL base 0.25 ppo 0.5 3".split()
    assert shown.index("paragraph.") < start < shown.index("Key")


def test_a_run_without_anything_still_has_a_page(tmp_path):
    text = write_report(tmp_path).read_text()
    assert f"run: {tmp_path.name}" in text
    assert Page(text).open == []


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere")


def row(step, prompt, response, **numbers):
    return {"step": step, "prompt": prompt, "response": response} | numbers


def test_answers_to_each_prompt_stand_side_by_side():
    compared = compare_samples(
        [
            row(0, "a", "a0", score=-1.0),
            row(0, "a", "a0, second answer"),
            row(0, "b", "b0"),
            row(5, "a", "a5"),
            row(9, "a", "a9", score=2.0, length=4),
            row(9, "c", "c9", score=None),
            row(9, "a", "a9, second answer"),
        ]
    )
    assert compared == [
        {
            "prompt": "a",
            "order": 1,
            "answers": [
                {"step": 0, "response": "a0", "numbers": {"score": -1.0}},
                {"step": 5, "response": "a5", "numbers": {}},
                {"step": 9, "response": "a9", "numbers": {"score": 2.0, "length": 4}},
            ],
        },
        {
            "prompt": "a",
            "order": 2,
            "answers": [
                {"step": 0, "response": "a0, second answer", "numbers": {}},
                {"step": 9, "response": "a9, second answer", "numbers": {}},
            ],
        },
        {
            "prompt": "b",
            "order": 1,
            "answers": [{"step": 0, "response": "b0", "numbers": {}}],
        },
        {
            "prompt": "c",
            "order": 1,
            "answers": [{"step": 9, "response": "c9", "numbers": {}}],
        },
    ]


@pytest.mark.parametrize(
    ("evaluations", "shown"),
    [
        (1, [0]),
        (2, [0, 1]),
        (5, [0, 1, 2, 3, 4]),
        (9, [0, 2, 4, 6, 8]),
        (101, [0, 25, 50, 75, 100]),
    ],
)
def test_of_many_steps_five_are_shown_evenly(evaluations, shown):
    (compared,) = compare_samples([row(i, "p", f"r{i}") for i in range(evaluations)])
    assert [answer["step"] for answer in compared["answers"]] == shown


@pytest.mark.parametrize("evaluations", range(1, 40))
def test_no_step_is_shown_twice_and_gaps_differ_by_one_at_most(evaluations):
    (compared,) = compare_samples([row(i, "p", "r") for i in range(evaluations)])
    steps = [answer["step"] for answer in compared["answers"]]
    assert len(steps) == min(evaluations, 5)
    assert (steps[0], steps[-1]) == (0, evaluations - 1)
    gaps = {after - before for before, after in itertools.pairwise(steps)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_reasoning_is_text_and_its_numbers_stand_below_it(run):
    reasoning = "<think>7 & 8\n" + "again " * 2000 + "</think><answer>15</answer>"
    with SamplesWriter(run.samples) as samples:
        for step in (0, 20, 40):
            sample = {"prompt": "7 + 8 = <b>?", "response": f"{reasoning} at {step}"}
            scores = {"score": step / 80, "exact_answer": 1.0, "kl": None}
            samples.write(step, [sample | scores, sample | scores])
    text = report(run)
    page = Page(text)
    assert page.open == []
    assert not {"think", "answer"} & set(page.tags)
    shown = "".join(page.text)
    assert all(shown.count(f"{reasoning} at {step}") == 2 for step in (0, 20, 40))
    assert shown.count("7 + 8 = <b>?") == 2
    assert shown.count("response 2 of each step") == 1
    assert "response 1 of each step" not in shown
    below = re.search(r" at 40</div>\s*(<dl.*?</dl>)", text, re.DOTALL)
    assert below is not None
    told = [part.strip() for part in Page(below[1]).text if part.strip()]
    assert told == ["score", "0.5", "exact_answer", "1"]


def test_key_numbers_of_a_verifiable_task_begin_with_pass_at_1(run):
    write_metrics(
        run,
        [
            {"reward/score_mean": 1.0, "group/no_signal": 0.5, "kl/sequence": 3.0},
            {"eval/pass_at_4": 0.75, "eval/pass_at_1": 0.25, "eval/reward/truth": 0.5},
            {"eval/pass_at_4": 0.875, "eval/pass_at_1": 0.5, "eval/reward/truth": 0.4},
        ],
    )
    tiles = re.findall(r'<div class="tile.*?</div>', report(run), re.DOTALL)
    assert ["".join(Page(tile).text).strip() for tile in tiles] == [
        "pass@1, held-out0.5from 0.25",
        "Held-out truth0.4from 0.5",
        "Score1from 1",
        "KL per response3from 3",
        "Zero-variance groups0.5from 0.5",
    ]


@pytest.mark.parametrize(
    ("failures", "told"), [((0, 0), None), ((2, 3), "5"), ((0, 1), "1")]
)
def test_header_counts_failed_rewards_and_response_tokens(run, failures, told):
    tokens = (600, 1500)  # sampled so far
    write_metrics(
        run,
        [
            {"reward/failures": failed, "rollout/tokens": so_far}
            for failed, so_far in zip(failures, tokens, strict=True)
        ],
    )
    facts = re.search(r"<dl.*?</dl>", report(run), re.DOTALL)
    assert facts is not None
    words = [text.strip() for text in Page(facts.group()).text if text.strip()]
    header = dict(zip(words[::2], words[1::2], strict=True))
    assert header.get("Reward failures") == told
    assert header["Response tokens"] == "1,500"


def test_answers_beyond_the_page_are_counted(run):
    rows = [{"prompt": f"<{i}>", "response": "r", "score": 0.5} for i in range(203)]
    run.samples.write_text("".join(json.dumps({"step": 1} | r) + "\n" for r in rows))
    text = report(run)
    assert "&lt;199&gt;" in text
    assert "&lt;200&gt;" not in text
    assert "194 more</summary>" in text  # 6 open, 200 on the page
    assert "3 more prompts are in samples.jsonl" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1 / 3, "0.3333"),
        (-12345.6, "-12,346"),
        (2e-5, "2.00e-05"),
        (1234567, "1,234,567"),
        (float("nan"), "nan"),
        (True, "True"),
        ("text", "text"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_durations():
    assert format_seconds(59.94) == "59.9 s"
    assert format_seconds(61) == "1 min 1 s"
    assert format_seconds(7325) == "2 h 2 min"
