"""Small fast tokenizers of every kind that can be cut, trained on a few texts, and texts that are hard to write."""

import json
from pydoc_data import topics

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ENGLISH = topics.topics["assert"]
OTHERS = "Größe naïve café señor привет мир 你好 世界 مرحبا नमस्ते 한국어 ภาษา ελληνικά 😀👍 ½ ﬁ \u200d"
ODD = (
    "", " ", "  two  spaces\n\n\tand\r\ntabs ", "e\u0301 \ufb01 \u2460 \u00a0 \u3000", "\U0001f468\u200d\U0001f469",
    "a</s>b<s> <pad>", "▁▁x ▁", "\ufffd\u0000\u0007", "def f(x_1):\n    return x**2  # ok", "ŧħę ðæ ﷽ 𓀀 ꙮ",
)  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [ENGLISH, OTHERS, *ODD, topics.topics["with"], topics.topics["import"]]


def _fast(made):
    made.add_special_tokens(SPECIAL)
    ids = [made.token_to_id(token) for token in SPECIAL]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", ids[1]), ("</s>", ids[2])])
    made.post_processor = processors.Sequence([made.post_processor, template]) if made.post_processor else template
    made.enable_padding(pad_id=ids[0], pad_token="<pad>")
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _trained(model, trainer, normalizer=None, before=None, decoder=None, after=None):
    made = Tokenizer(model)
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, before, decoder
    if after is not None:
        made.post_processor = after
    made.train_from_iterator(TEXTS * 2, trainer)
    return made


def _byte_level():
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    parts = (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False))
    return _trained(models.BPE(), trainer, None, *parts)


def _all_splits(made):
    """As Transformers converts a SentencePiece or tiktoken file: a merge for every split of a token into two others."""
    state = json.loads(made.to_str())
    vocab = state["model"]["vocab"]
    merges = []
    for token in sorted(vocab, key=vocab.get):
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab and token not in SPECIAL]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    state["model"]["merges"] = [list(pair) for pair in merges]
    return Tokenizer.from_str(json.dumps(state))


def _spaces():
    """Normalizer and decoder of Llama 2 and Gemma."""
    normal = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return normal, None, back


def _byte_fallback():
    trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    made = _trained(models.BPE(unk_token="<unk>"), trainer, *_spaces())
    state = json.loads(made.to_str())
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return _all_splits(Tokenizer.from_str(json.dumps(state)))


def _unigram(byte_fallback):
    special = [*SPECIAL, *BYTES] if byte_fallback else SPECIAL
    trainer = trainers.UnigramTrainer(vocab_size=620, special_tokens=special, unk_token="<unk>", show_progress=False)
    if not byte_fallback:
        space = {"before": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
        return _trained(models.Unigram(), trainer, normalizers.NFKC(), **space)
    made = _trained(models.Unigram(), trainer, *_spaces())
    state = json.loads(made.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(state))


def _word_piece():
    trainer = trainers.WordPieceTrainer(vocab_size=620, special_tokens=SPECIAL, show_progress=False)
    before = pre_tokenizers.BertPreTokenizer()
    return _trained(models.WordPiece(unk_token="<unk>"), trainer, normalizers.BertNormalizer(), before, decoders.WordPiece())


def _characters():
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, end_of_word_suffix="</w>", continuing_subword_prefix="", show_progress=False
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return _trained(model, trainer, None, pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder())


def _with_added(made):
    made.add_tokens([AddedToken("<|tool|>", special=False), AddedToken("  ", normalized=False)])
    return made


ALL = {
    name: _fast(make())
    for name, make in {
        "byte_level": lambda: _with_added(_byte_level()),
        "merges_of_all_splits": lambda: _all_splits(_byte_level()),
        "byte_fallback": _byte_fallback,
        "unigram": lambda: _unigram(False),
        "unigram_bytes": lambda: _unigram(True),
        "word_piece": _word_piece,
        "characters": _characters,
    }.items()
}
