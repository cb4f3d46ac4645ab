"""Small tokenizers with chat templates of the kinds that instruct checkpoints have."""

from collections.abc import Callable, Sequence

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_jax.models.tokenizer import train_tokenizer

SAMPLES = ["user assistant system model", "What is it? It is so.", "Hello there"] * 3

# Every turn between two tokens; any role, system too.
CHATML = (
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# BOS first, headers of several tokens, contents trimmed.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# No system message; the assistant is called model.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# The system message within the first user's turn; nothing marks where answers begin.
MISTRAL = (
    "{{ bos_token }}"
    "{% set ns = namespace(system='') %}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system + m.content }}[/INST]"
    "{% set ns.system = '' %}"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

# What a model thought is left out of earlier turns.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(template: str = CHATML) -> PreTrainedTokenizerBase:
    """Ends turns with its EOS; the base model's EOS is a second one."""
    return _byte_level(
        ["<|im_start|>", "<|im_end|>"], template, eos="<|im_end|>", adds_bos=False
    )


def llama3() -> PreTrainedTokenizerBase:
    """Ends turns with <|eot_id|>, texts with <|endoftext|>."""
    tokens = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return _byte_level(tokens, LLAMA3, eos="<|eot_id|>", bos="<|begin|>")


def gemma() -> PreTrainedTokenizerBase:
    """Ends turns with a token that is not its EOS."""
    tokens = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return _byte_level(tokens, GEMMA, eos="<eos>", bos="<bos>")


def mistral() -> PreTrainedTokenizerBase:
    """Like SentencePiece: every text begins with a space, [INST] is no token."""
    return sentencepiece([], MISTRAL)


def phi() -> PreTrainedTokenizerBase:
    """Like SentencePiece, whose special tokens swallow white space after them."""
    tokens = [
        AddedToken(name, rstrip=True, special=True, normalized=False)
        for name in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    ]
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    return sentencepiece(tokens, template)


def sentencepiece(
    tokens: Sequence[AddedToken], template: str
) -> PreTrainedTokenizerBase:
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    named = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[*named, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    bpe.train_from_iterator(SAMPLES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return _with_bos(tokenizer)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "chatml": chatml,
    "llama3": llama3,
    "gemma": gemma,
    "mistral": mistral,
    "phi": phi,
}


def _byte_level(
    tokens: Sequence[str],
    template: str,
    *,
    eos: str,
    bos: str | None = None,
    adds_bos: bool = True,
) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(SAMPLES, vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.eos_token = eos
    tokenizer.bos_token = bos
    tokenizer.chat_template = template
    return _with_bos(tokenizer) if adds_bos else tokenizer


def _with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts BOS before what is encoded with special tokens, as most checkpoints do."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer
