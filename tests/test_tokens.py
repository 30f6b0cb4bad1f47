"""tokens and pruning.vocab: a tokenizer of some tokens writes every text as one of all does."""

import json

import pytest
import tiny
import tiny_tokenizers
import torch
from tokenizers import models
from transformers import AutoTokenizer

from hf_minitron.data.tokens import Tokens, token_scores
from hf_minitron.pruning.vocab import cut_tokenizer
from hf_minitron.shape import ShapeError

SIZE = {name: max(made.get_vocab().values()) + 1 for name, made in tiny_tokenizers.ALL.items()}


def counts(name, text=tiny_tokenizers.ENGLISH):
    return torch.bincount(torch.tensor(tiny_tokenizers.ALL[name](text)["input_ids"]), minlength=SIZE[name])


def cut(name, size, text=tiny_tokenizers.ENGLISH):
    made = tiny_tokenizers.ALL[name]
    ids = token_scores(made, counts(name, text), size).nonzero().flatten().tolist()
    assert len(ids) == size
    return made, cut_tokenizer(made, ids, SIZE[name]), ids


def floor(name):
    with pytest.raises(ShapeError, match=r"vocab: 1 is fewer than the [\d,]+ tokens that always stay") as caught:
        token_scores(tiny_tokenizers.ALL[name], counts(name), 1)
    return int(str(caught.value).rpartition("Use ")[2].split()[0].replace(",", ""))


@pytest.mark.parametrize("name", tiny_tokenizers.ALL)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_every_text_is_written_and_read_as_before(name, share):
    least = floor(name)
    size = least + int(share * (SIZE[name] - least))
    made, small, ids = cut(name, size)
    assert len(small) == size < SIZE[name]
    for text in (*tiny_tokenizers.ODD, tiny_tokenizers.ENGLISH, tiny_tokenizers.OTHERS):
        before, after = (each(text)["input_ids"] for each in (made, small))
        assert max(after) < size, text
        assert small.decode(after) == made.decode(before), text
    for token in ("bos", "eos", "pad", "unk"):
        assert getattr(small, f"{token}_token") == getattr(made, f"{token}_token")
    assert small("a b")["input_ids"][0] == ids.index(made("a b")["input_ids"][0])
    assert all(made.convert_ids_to_tokens(ids[index]) == token for token, index in small.get_vocab().items())


@pytest.mark.parametrize("name", tiny_tokenizers.ALL)
def test_what_a_text_needs_stays_and_can_be_built(name):
    made, small, ids = cut(name, floor(name) + 60)
    again = made(tiny_tokenizers.ENGLISH)["input_ids"]
    common = torch.tensor(again).bincount().argsort(descending=True)[:10].tolist()
    assert set(common) <= set(ids), "one of the commonest tokens is gone"
    built = 0
    for index in ids:
        token = made.convert_ids_to_tokens(index).removesuffix("</w>")
        if [part.id for part in made.backend_tokenizer.model.tokenize(token)] == [index]:  # else a token that no text gives
            assert [part.id for part in small.backend_tokenizer.model.tokenize(token)] == [ids.index(index)], token
            built += len(token) > 1
    assert built > 20


def test_a_token_stays_with_the_parts_that_it_is_really_merged_of():
    made = tiny_tokenizers.ALL["merges_of_all_splits"]
    tokens = Tokens(json.loads(made.backend_tokenizer.to_str()))
    several = [token for token, pairs in tokens._pairs.items() if len(pairs) > 1]
    assert several, "the test has no token of several merges"
    for token in several:
        merges = [pair for pair in tokens._merges if tokens._merged(pair) != token or pair == tokens._parts(token)]
        rebuilt = models.BPE(tokens.ids, merges)
        found = [[part.id for part in each.tokenize(token)] for each in (made.backend_tokenizer.model, rebuilt)]
        assert found[0] == found[1], token


@pytest.mark.parametrize(("kind", "message"), [("words", "is a WordLevel, which cannot"), ("slow", "has no tokenizer.json")])
def test_a_tokenizer_that_cannot_be_cut_is_refused_in_one_line(kind, message, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    if kind == "slow":
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=message) as caught:
        token_scores(tmp_path, torch.zeros(99), 50)
    assert "\n" not in str(caught.value)


def test_ids_without_what_they_need_are_refused():
    made = tiny_tokenizers.ALL["byte_level"]
    with pytest.raises(ValueError, match=r"vocab: token '.*' \(id \d+\) and \d+ others are not kept"):
        cut_tokenizer(made, list(range(300, 400)), SIZE["byte_level"])


def test_ids_beyond_the_vocabulary_stay_beyond_and_ids_without_tokens_go_first(tmp_path):
    made = tiny_tokenizers.ALL["byte_level"]
    made.save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    size = SIZE["byte_level"]
    own.add_tokens(["<image>"], special_tokens=True)  # as Gemma's, whose id no model of text has
    scores = token_scores(own, torch.zeros(size), size - 40)
    small = cut_tokenizer(own, scores.nonzero().flatten().tolist(), size)
    assert small.convert_tokens_to_ids("<image>") == size - 40
    padded = token_scores(made, torch.zeros(size + 30), size)
    assert padded[:size].all(), "a token went before ids that are none"
    assert not padded[size:].any()
