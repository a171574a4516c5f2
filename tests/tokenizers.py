"""Small tokenizers in the shapes of real ones: what stands before a text, what merges, which offsets, fast and slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CORPUS = [
    "the sky is blue, and the answer is yes or no; a+b=c and x = 1.\n\nA new paragraph  with   spaces.\n",
    "def f(x):\n    if x:\n        return x\n    return 0\n",
    "0 1 2 3 4 5 6 7 8 9 R Q h j k m q v w z",
    "Zwölf größere Brücken, 天空是蓝色的, naïve café 🙂 and the end.\n",
] * 3
MARKUP = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|end|>"]


def metaspace(prefix: str) -> Any:
    """SentencePiece's shape: a word mark before each ``prepend`` (Llama 2) or ``first`` text, or none (``never``)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif prefix == "never":  # Gemma
        inner.normalizer = normalizers.Replace(" ", "▁")
    else:  # "first", "always"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False, max_token_length=8)
    inner.train_from_iterator(CORPUS, trainer)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(inner, bos="<s>", eos="</s>", adds_bos=True)


def byte_level(trim: bool = True) -> Any:
    """Llama 3's and Qwen's shape: bytes, merges across spaces and line ends, offsets without spaces where trimmed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # so that all may merge
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=6
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    return _wrapped(inner, bos="<|begin|>", eos="<|eot_id|>", adds_bos=trim)


def word_piece() -> Any:
    """BERT's shape: lower case, no white space, a token at each end of a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _wrapped(inner, bos="[CLS]", eos="[SEP]", unk_token="[UNK]", pad_token="[PAD]")


def slow() -> Any:
    """A tokenizer in Python, without offsets: words with a mark before each, also the first of a text, and letters."""
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        def __init__(self, **kwargs: Any) -> None:
            words = ["▁yes", "▁no", "▁the", "▁answer", "yes", "no", "\n\n", "▁"]
            self.words = sorted(words, key=len, reverse=True)
            everything = ["<s>", "</s>", "<unk>", *words, *map(chr, range(32, 127)), "\n"]
            self.table = {token: index for index, token in enumerate(dict.fromkeys(everything))}
            super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs)

        @property
        def vocab_size(self) -> int:
            return len(self.table)

        def get_vocab(self) -> dict[str, int]:
            return {**self.table, **self.added_tokens_encoder}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            text, found = "▁" + text.replace(" ", "▁"), []
            while text:
                word = next((word for word in self.words if text.startswith(word)), text[0])
                found.append(word)
                text = text[len(word) :]
            return found

        def _convert_token_to_id(self, token: str) -> int:
            return self.table.get(token, self.table["<unk>"])

        def _convert_id_to_token(self, index: int) -> str:
            return list(self.table)[index]

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens).replace("▁", " ").removeprefix(" ")

    return Slow(additional_special_tokens=MARKUP, model_max_length=10**6)


def template_of_trl(name: str) -> str:
    """A real model's chat template, as TRL ships it for its tests of what it knows."""
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _wrapped(inner: Any, *, bos: str, eos: str, adds_bos: bool = False, **special: str) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=MARKUP,
        clean_up_tokenization_spaces=False,
        model_max_length=10**6,
        **special,
    )
    if adds_bos:
        single = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, made.bos_token_id)]
        )
        before = made.backend_tokenizer.post_processor
        made.backend_tokenizer.post_processor = single if before is None else processors.Sequence([before, single])
    return made


TOKENIZERS = {
    "prepend (Llama 2)": lambda: metaspace("prepend"),
    "always": lambda: metaspace("always"),
    "first (Mistral)": lambda: metaspace("first"),
    "never (Gemma)": lambda: metaspace("never"),
    "bytes, offsets trimmed (Llama 3)": byte_level,
    "bytes (Qwen)": lambda: byte_level(trim=False),
    "words (BERT)": word_piece,
    "slow": slow,
}
