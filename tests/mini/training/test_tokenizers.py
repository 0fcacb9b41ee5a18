import json

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer, T5TokenizerFast

from mini.training import tokenizers
from sd35_trt.mini import checkpoint_path


@pytest.fixture(scope="module")
def texts():
    return tokenizers.captions(2000)


def test_clip_ids_have_the_layout_of_sd35(texts):
    tokenizer = tokenizers.build_clip(texts, pad_token="!")
    assert tokenizer.pad_token_id == 0
    assert tokenizer.bos_token_id == len(tokenizer) - 2
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer("A RED star").input_ids == tokenizer("a red star").input_ids


def test_t5_knows_the_words_and_spells_the_others(texts):
    tokenizer = tokenizers.build_t5(texts)
    assert tokenizer.tokenize("a non-red star") == ["▁a", "▁non-", "red", "▁star"]
    assert tokenizer.unk_token_id not in tokenizer("Quizzical zebras, 42!").input_ids
    assert tokenizer("").input_ids == [1]


def test_building_twice_gives_one_vocabulary(texts):
    first, second = (tokenizers.build_clip(texts).get_vocab() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_the_tokenizers_library_reads_the_packaged_files(name):
    folder = checkpoint_path() / name
    kind = T5TokenizerFast if name == "tokenizer_3" else CLIPTokenizer
    text = "a large ring that isn't blue"
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert ids == kind.from_pretrained(folder)(text).input_ids


def test_saved_clip_has_the_files_of_transformers_4(texts, tmp_path):
    tokenizer = tokenizers.build_clip(texts)
    tokenizers.save_clip(tokenizer, tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text()) == tokenizer.get_vocab()
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    assert merges[0] == "#version: 0.2"
    assert all(len(line.split(" ")) == 2 for line in merges[1:])
