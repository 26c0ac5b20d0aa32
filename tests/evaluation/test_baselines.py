"""Baselines against a brute-force count in plain Python, and against entropies known in closed form."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.evaluation import baselines
from megatron_bitlm.evaluation.baselines import BigramCounts, SmoothedBigram, counted_pairs, measure_baselines

V, BOS, EOS = 8, 6, 7
TEXTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=6)


def frame(text: list[int], block_size: int) -> list[int]:
    num_eos = block_size - len(text) % block_size
    return [BOS] * block_size + list(text) + [EOS] * num_eos


def framed(texts: list[list[int]], block_size: int) -> np.ndarray:
    return np.array([token for text in texts for token in frame(text, block_size)], dtype=np.int32)


def brute_force(train: list[list[int]], heldout: list[list[int]]) -> tuple[float, float]:
    """Total nats of the held-out tokens under both models, one probability at a time."""

    def steps(texts):
        for text in texts:
            yield from zip([BOS, *text], [*text, EOS], strict=True)

    def discount(counter):
        once = sum(count == 1 for count in counter.values()) + 1
        twice = sum(count == 2 for count in counter.values()) + 1
        return once / (once + 2 * twice)

    pairs = Counter(steps(train))
    tokens = Counter(target for _, target in steps(train))
    total, d1, d2 = tokens.total(), discount(tokens), discount(pairs)

    def p1(token):
        return max(tokens[token] - d1, 0) / total + d1 * len(tokens) / total / V

    def p2(context, token):
        row = {target: count for (source, target), count in pairs.items() if source == context}
        if not row:
            return p1(token)
        context_total = sum(row.values())
        return max(row.get(token, 0) - d2, 0) / context_total + d2 * len(row) / context_total * p1(token)

    unigram = -sum(math.log(p1(token)) for _, token in steps(heldout))
    bigram = -sum(math.log(p2(context, token)) for context, token in steps(heldout))
    return unigram, bigram


@given(train=TEXTS, heldout=TEXTS, block_size=st.integers(1, 4))
def test_equals_brute_force(train, heldout, block_size):
    num_bytes = np.array([1, 2, 3, 1, 2, 3, 0, 0])
    results = measure_baselines(
        [framed(train, block_size)],
        [framed(heldout[:1], block_size), framed(heldout[1:], block_size)],
        vocab_size=V,
        bos_id=BOS,
        eos_id=EOS,
        token_num_bytes=num_bytes,
    )
    num_tokens = sum(len(text) + 1 for text in heldout)
    text_num_bytes = sum(int(num_bytes[token]) for text in heldout for token in text)
    for result, nats in zip((results["unigram"], results["bigram"]), brute_force(train, heldout), strict=True):
        assert result.num_tokens == num_tokens
        assert result.num_bytes == text_num_bytes
        assert result.nats_per_token == pytest.approx(nats / num_tokens, rel=1e-12)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / text_num_bytes, rel=1e-12)


@given(texts=TEXTS)
def test_distributions_sum_to_one_for_seen_and_unseen_contexts(texts):
    counts = BigramCounts(V, bos_id=BOS, eos_id=EOS)
    counts.add(framed(texts, 2))
    model = SmoothedBigram(counts)
    assert model.unigram.sum() == pytest.approx(1, abs=1e-12)
    assert model.unigram.min() > 0
    every = np.arange(V)
    for context in range(V):
        row = model.pair_probabilities(np.full(V, context), every)
        assert row.sum() == pytest.approx(1, abs=1e-12)
        assert row.min() > 0


def test_eos_fill_and_bos_are_not_counted():
    contexts, targets = counted_pairs(np.array([6, 6, 6, 6, 1, 7, 7, 7, 6, 6, 6, 6, 2, 3, 4, 7]), bos_id=6, eos_id=7)
    assert contexts.tolist() == [6, 1, 6, 2, 3, 4]
    assert targets.tolist() == [1, 7, 2, 3, 4, 7]


def test_counting_in_pieces_equals_counting_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    documents = [framed([rng.integers(0, 6, size=rng.integers(1, 40)).tolist()], 4) for _ in range(50)]
    whole = BigramCounts(V, bos_id=BOS, eos_id=EOS)
    whole.add(np.concatenate(documents))
    monkeypatch.setattr(baselines, "_MERGE_NUM_TOKENS", 64)
    pieces = BigramCounts(V, bos_id=BOS, eos_id=EOS)
    for document in documents:
        pieces.add(document)
    for left, right in zip(whole.table(), pieces.table(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_reaches_the_entropies_of_a_known_markov_chain():
    """Tokens 0..3: stay with probability 0.7, else one of the others. Stationary: uniform."""
    rng = np.random.default_rng(1)
    stay = rng.random(400_000) < 0.7
    jumps = np.where(stay, 0, rng.integers(1, 4, size=stay.size))
    chain = np.cumsum(jumps) % 4
    halves = [np.concatenate([[BOS], half, [EOS]]) for half in np.split(chain, 2)]
    results = measure_baselines(
        halves[:1],
        halves[1:],
        vocab_size=V,
        bos_id=BOS,
        eos_id=EOS,
        token_num_bytes=np.array([1] * 6 + [0] * 2),
    )
    assert results["unigram"].nats_per_token == pytest.approx(math.log(4), abs=1e-3)
    conditional = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1))
    assert results["bigram"].nats_per_token == pytest.approx(conditional, abs=4e-3)
    assert results["bigram"].bits_per_byte == pytest.approx(conditional / math.log(2), abs=6e-3)


def test_qwen_sized_vocabulary_needs_no_dense_table():
    vocab_size = 151_669
    rng = np.random.default_rng(2)
    text = (rng.zipf(1.3, size=200_000) % (vocab_size - 2)).astype(np.int64)
    document = np.concatenate([[vocab_size - 2], text, [vocab_size - 1]])
    num_bytes = np.ones(vocab_size, dtype=np.int64)
    num_bytes[-2:] = 0
    results = measure_baselines(
        [document], [document], vocab_size=vocab_size, bos_id=vocab_size - 2, eos_id=vocab_size - 1,
        token_num_bytes=num_bytes,
    )  # fmt: skip
    assert results["bigram"].nats_per_token < results["unigram"].nats_per_token < math.log(vocab_size)


def test_bad_input_is_named():
    options = {"vocab_size": V, "bos_id": BOS, "eos_id": EOS, "token_num_bytes": np.ones(V, dtype=int)}
    document = framed([[1, 2]], 2)
    with pytest.raises(BitLMError, match="training documents hold no tokens"):
        measure_baselines([], [document], **options)
    with pytest.raises(BitLMError, match="held-out documents hold no text"):
        measure_baselines([document], [], **options)
    with pytest.raises(ValueError, match=r"\[0, 8\), found 9"):
        measure_baselines([np.array([BOS, 9, EOS])], [document], **options)
    with pytest.raises(ValueError, match=r"\[0, 8\), found -1"):
        measure_baselines([np.array([BOS, -1, EOS])], [document], **options)
    with pytest.raises(ValueError, match="whole documents"):
        measure_baselines([document[2:]], [document], **options)
    with pytest.raises(ValueError, match="whole documents"):
        measure_baselines([document[:-2]], [document], **options)
    with pytest.raises(ValueError, match="one-dimensional"):
        measure_baselines([document[None]], [document], **options)
