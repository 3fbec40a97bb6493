"""Tokenizers of the text encoders that pipelines have, of letters and bytes instead of words: nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

VOCABULARY = 512  # of the tiny text encoders: more than any of these tokenizers has
LENGTH = 512
LETTERS = [chr(code) for code in range(33, 127)]
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # of chats
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(kind: str, length: int = LENGTH) -> Any:
    """Make a tokenizer.

    Args:
        kind: ``"t5"``, ``"clip"``, ``"bert"``, ``"gemma"``, ``"llama"``, ``"bytes"`` (ByT5) or ``"chat"`` (Qwen, with a
            template of chats).
        length: longest text, in tokens.

    Raises:
        ModuleNotFoundError: transformers is not installed.

    Example:
        >>> made = tokenizer("t5")
        >>> made.decode(made("a cat").input_ids, skip_special_tokens=True)
        'a cat'
    """
    return _KINDS[kind](importlib.import_module("transformers"), length)


def _numbered(*tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(token for some in tokens for token in some)}


def _t5(transformers: Any, length: int) -> Any:
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -1.0) for letter in ("▁", *LETTERS))]
    return transformers.T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=length)


def _clip(transformers: Any, length: int) -> Any:
    words = _numbered(["<|startoftext|>", "<|endoftext|>"], LETTERS, [f"{letter}</w>" for letter in LETTERS])
    return transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=length)


def _bert(transformers: Any, length: int) -> Any:
    words = _numbered(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], LETTERS, [f"##{letter}" for letter in LETTERS])
    return transformers.BertTokenizer(vocab=words, model_max_length=length)


def _gemma(transformers: Any, length: int) -> Any:
    words = _numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], ["▁", *LETTERS], _BYTES)
    return transformers.GemmaTokenizer(
        vocab=words, merges=[], model_max_length=length, padding_side="right", add_bos_token=True
    )


def _llama(transformers: Any, length: int) -> Any:
    words = _numbered(["<unk>", "<s>", "</s>"], ["▁", *LETTERS], _BYTES)
    made = transformers.LlamaTokenizer(vocab=words, merges=[], model_max_length=length, add_bos_token=True)
    made.pad_token = "</s>"
    return made


def _bytes(transformers: Any, length: int) -> Any:
    return transformers.ByT5Tokenizer(model_max_length=length)


def _chat(transformers: Any, length: int) -> Any:
    alphabet = importlib.import_module("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    words = _numbered(MARKS, sorted(alphabet))
    made = transformers.Qwen2Tokenizer(vocab=words, merges=[], model_max_length=length, chat_template=CHAT)
    made.add_special_tokens({"additional_special_tokens": [*MARKS[:2]]})
    return made


_BYTES = [f"<0x{code:02X}>" for code in range(256)]  # for all that is no letter
_KINDS: dict[str, Callable[[Any, int], Any]] = {
    "t5": _t5,
    "clip": _clip,
    "bert": _bert,
    "gemma": _gemma,
    "llama": _llama,
    "bytes": _bytes,
    "chat": _chat,
}
