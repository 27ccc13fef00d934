"""Tokenizers of the kinds that language models use, trained here on a few sentences.

They differ in what matters to a boundary between two texts: which characters merge across it,
whether a space is put before a text, and which special tokens are put around it.
"""

import json

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\nName three colours.\n\n### Response:\nRed, green and blue.\n\n\n  - one",
    "### Judgment:\nThe answer is right, but the response is too long.\n\n### Response:\n",
    "def f(x):\n    return {x: [1, 2, 30]}  # 2024...\n\n\"quoted\" 'text' (why?)",
    "the quick brown fox jumps over the lazy dog; the cat sat on the mat and the hat",
] * 3


def byte_level():
    """GPT-2, SmolLM2: bytes, EOS is also the padding, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _byte_level(tokenizer, eos_token="</s>", pad_token="</s>")


def byte_level_with_bos():
    """Llama-3: newlines merge with the punctuation before them and with each other; BOS."""
    tokenizer = Tokenizer(models.BPE())
    pattern = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _byte_level(tokenizer, around="<s> $A", bos_token="<s>", eos_token="</s>")


def sentencepiece(sentences=SENTENCES):
    """Llama-2, Mistral: a space is put before the text, other characters are bytes; BOS, no pad."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = _byte_fallback(sentences, special)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    return _fast(tokenizer, around="<s> $A", **special)


def sentencepiece_without_space():
    """Gemma: no space is put before the text, newlines are tokens, the pad is not the EOS; BOS."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = _byte_fallback(SENTENCES, special, ("\n", "\n\n"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return _fast(tokenizer, around="<s> $A", **special)


def words():
    """Lossy: words and punctuation apart, white space forgotten; BOS and EOS around the text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    return _fast(tokenizer, around="<s> $A </s>", bos_token="<s>", eos_token="</s>",
                 unk_token="<unk>")


TOKENIZERS = {"byte_level": byte_level, "byte_level_with_bos": byte_level_with_bos,
              "sentencepiece": sentencepiece,
              "sentencepiece_without_space": sentencepiece_without_space, "words": words}


def _byte_fallback(sentences, special, newlines=()):
    """BPE with a token for each byte, and some for newlines; no text is split before."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learnt.train_from_iterator([sentence.replace("\n", " ") for sentence in sentences],
                               trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(learnt.to_str())["model"]
    tokens = [*special.values(), *(f"<0x{byte:02X}>" for byte in range(256)),
              *newlines, *learnt["vocab"]]
    merges = [tuple(merge) for merge in learnt["merges"]]
    merges += [(newlines[0], newlines[0])] if newlines else []
    tokenizer = Tokenizer(models.BPE(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges,
        unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse()])
    tokenizer.add_special_tokens(list(special.values()))
    return tokenizer


def _byte_level(tokenizer, around=None, **special):
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return _fast(tokenizer, around, **special)


def _fast(tokenizer, around=None, **special):
    if around:
        used = [token for token in ("<s>", "</s>") if token in around]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(t, tokenizer.token_to_id(t)) for t in used])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
