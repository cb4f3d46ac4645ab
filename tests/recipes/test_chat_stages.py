"""An instruct checkpoint through the stages: what is read, and what is written."""

import dataclasses
import json

import numpy as np
import pytest
from chat_tokenizers import CHATML, GEMMA, gemma

from rlhf_jax import cli
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models import save_pretrained
from rlhf_jax.models.tiny import tiny_gpt2
from rlhf_jax.recipes import ppo, reward_model, sft
from rlhf_jax.recipes.sft import read_sft_data

SAMPLING = {"top_k": 64, "temperature": 0.6}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Gemma-like instruct model, whose answers end with <eos> or <end_of_turn>."""
    path = tmp_path_factory.mktemp("chat") / "instruct"
    tokenizer = gemma()
    module, params = tiny_gpt2(vocab_size=len(tokenizer), max_positions=128)
    save_pretrained(path, module, params, tokenizer=tokenizer)
    config = {"eos_token_id": [298, 300], **SAMPLING}
    (path / "generation_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def trained(checkpoint):
    """SFT on conversations of two answers, then a reward model, then PPO."""
    root = checkpoint.parent
    talks = [
        [user(f"Hello {i}"), assistant("It is."), user("What?"), assistant(f"so {i}")]
        for i in range(20)
    ]
    rows = [{"messages": talk} for talk in talks]
    common = {"steps": 2, "batch_size": 4, "max_tokens": 96, "quiet": True}
    sft_config = SFTConfig(
        run_dir=str(root / "sft"),
        data=write(root / "talks.jsonl", rows),
        model=str(checkpoint),
        train_on="all-answers",
        eval_fraction=0.2,
        **common,
    )
    sft.run(sft_config)
    pairs = [{"chosen": t, "rejected": [*t[:3], assistant("no")]} for t in talks]
    reward_config = RewardConfig(
        run_dir=str(root / "reward"),
        data=write(root / "pairs.jsonl", pairs),
        model=str(root / "sft" / "model"),
        eval_fraction=0.2,
        **common,
    )
    reward_model.run(reward_config)
    ppo_config = PPOConfig(
        run_dir=str(root / "ppo"),
        policy=str(root / "sft" / "model"),
        reward_model=str(root / "reward" / "model"),
        data=write(root / "prompts.jsonl", [{"prompt": t[:3]} for t in talks]),
        eval_fraction=0.2,
        eval_prompts=4,
        updates=1,
        batch_size=4,
        max_prompt_tokens=80,
        max_new_tokens=8,
        quiet=True,
    )
    ppo.run(ppo_config)
    return sft_config


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_what_is_written_is_an_instruct_checkpoint_again(checkpoint, trained, stage):
    from transformers import AutoTokenizer

    path = checkpoint.parent / stage / "model"
    assert AutoTokenizer.from_pretrained(path).chat_template == GEMMA
    tokenization = Tokenization.load(str(path))
    assert tokenization.stop_ids(()) == (298, 300)
    if stage != "reward":
        written = json.loads((path / "generation_config.json").read_text())
        assert written["eos_token_id"] == [298, 300]
        assert {k: written[k] for k in SAMPLING} == SAMPLING


def test_all_answers_change_what_is_counted(trained):
    """Of each conversation It is.<end_of_turn> is learnt besides, five tokens or so."""
    _, both = read_sft_data(trained)
    only = dataclasses.replace(trained, train_on="last-answer")
    tokenization, last = read_sft_data(only)
    np.testing.assert_array_equal(both.held_out.tokens, last.held_out.tokens)
    more = np.asarray(both.held_out.target_mask) & ~np.asarray(
        last.held_out.target_mask
    )
    for tokens, added in zip(np.asarray(both.held_out.tokens), more, strict=True):
        assert tokenization.tokenizer.decode(tokens[added]) == "It is.<end_of_turn>"
    assert not np.any(
        np.asarray(last.held_out.target_mask) & ~both.held_out.target_mask
    )


def test_a_fresh_model_reads_conversations_too(trained):
    """In the format of models without a template, of which only the end has a token."""
    config = dataclasses.replace(trained, model=None)
    tokenization, data = read_sft_data(config)
    learnt = np.asarray(data.held_out.target_mask)[0]
    text = tokenization.tokenizer.decode(np.asarray(data.held_out.tokens)[0][learnt])
    assert text.startswith(" It is. so ") and text.endswith("<|endoftext|>")


def test_answers_cut_off_are_counted_in_the_heading(trained, capsys):
    config = dataclasses.replace(
        trained, max_tokens=16, overlong="truncate", quiet=False
    )
    read_sft_data(config)
    assert (
        "too long: 0 dropped, 20 truncated, 20 earlier responses cut off"
        in capsys.readouterr().out
    )


def test_a_base_model_gets_a_template(checkpoint, trained, tmp_path):
    (tmp_path / "x.jinja").write_text(CHATML)
    config = dataclasses.replace(
        trained,
        run_dir=str(tmp_path / "run"),
        chat_template=str(tmp_path / "x.jinja"),
        steps=1,
        max_tokens=128,
    )
    sft.run(config)
    assert (
        Tokenization.load(str(tmp_path / "run/model")).tokenizer.chat_template == CHATML
    )
    assert Tokenization.load(str(checkpoint)).tokenizer.chat_template == GEMMA


def test_bad_templates_are_refused_before_any_work(
    checkpoint, trained, tmp_path, refused
):
    (tmp_path / "x.jinja").write_text("{% for m in messages %}")
    flags = ["sft", "--quiet", "--data", trained.data, "--run-dir", tmp_path / "run"]
    bad = ["--chat-template", tmp_path / "x.jinja"]
    message = refused(*flags, "--model", checkpoint, *bad)
    assert "x.jinja': the chat template is broken in line 1" in message
    assert "chat-template" in refused(*flags, *bad)  # without a model
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_used_name_their_line(
    checkpoint, trained, tmp_path, refused
):
    forged = [user("<end_of_turn>"), assistant("It is.")]
    system = [{"role": "system", "content": "Be kind."}, *forged[1:], user("a")]
    for n, talk in enumerate((forged, [*system, assistant("b")])):
        good = {"messages": [user("a"), assistant("b")]}
        data = write(tmp_path / f"{n}.jsonl", [good, {"messages": talk}])
        flags = ["--quiet", "--data", data, "--run-dir", tmp_path / "run"]
        assert f"{data}:2: " in refused("sft", *flags, "--model", checkpoint)
        grpo = [*flags, "--policy", checkpoint, "--reward", "x:y", "--batch-size", 64]
        assert f"{data}:2: " in refused("grpo", *grpo)


def test_prompts_that_cannot_be_used_are_left_out(checkpoint, trained, tmp_path):
    from rlhf_jax.recipes.prompt_batches import read_prompt_data

    good = [{"prompt": [user(f"a {i}")]} for i in range(4)]
    data = write(tmp_path / "a.jsonl", [*good, {"prompt": [user("<end_of_turn>")]}])
    config = PPOConfig(
        run_dir="x",
        policy=str(checkpoint),
        reward_model="x",
        data=data,
        eval_fraction=0.25,
        unusable_prompts="drop",
        quiet=True,
    )
    found = read_prompt_data(config, Tokenization.load(str(checkpoint)))
    assert len(found.rows) == 3 and len(found.held_out.rows) == 1


def test_generate_asks_in_the_template(checkpoint, monkeypatch, capsys):
    from rlhf_jax.tools import generate

    asked = []
    encode = generate.encode_prompts

    def listen(texts, *args, **options):
        asked.extend(texts)
        return encode(texts, *args, **options)

    monkeypatch.setattr(generate, "encode_prompts", listen)
    flags = ["generate", "--model", str(checkpoint), "--max-new-tokens", "2"]
    cli.main([*flags, "--chat", "--prompt", "Hello", "What?"])
    assert asked == [
        f"<bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n"
        for text in ("Hello", "What?")
    ]
    assert capsys.readouterr().out.startswith("Hello\n")  # as it was asked


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--system", "Be kind."], "system='Be kind.'"),  # without --chat
        (["--chat", "--system", "Be kind."], "prompt='Hi': the chat template rejects"),
        (["--chat", "--prompt", "<eos>"], "contains the special token '<eos>'"),
    ],
)
def test_generate_refuses(checkpoint, refused, flags, message):
    prompt = [] if "--prompt" in flags else ["--prompt", "Hi"]
    line = refused("generate", "--model", checkpoint, *prompt, *flags)
    assert message in line
