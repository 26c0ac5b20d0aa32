"""Sources: every format gives the same documents whatever the units, and errors name the place."""

import gzip
import hashlib
import json
import sysconfig

import pytest

from megatron_bitlm.data import corpus_units, installed_docs
from megatron_bitlm.data.corpus import documents, open_corpus
from megatron_bitlm.data.corpus_units import repaired
from megatron_bitlm.errors import BitLMError


def write_parquet(path, texts, key="text", rows_per_group=7):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), key: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)


def write_all_formats(folder, texts, write_jsonl):
    plain = write_jsonl(folder / "plain.jsonl", texts)
    content = (folder / "plain.jsonl").read_bytes()
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(content))
    import zstandard

    half = content.index(b"\n", len(content) // 2) + 1
    frames = [zstandard.compress(part) for part in (content[:half], content[half:])]
    (folder / "packed.jsonl.zst").write_bytes(b"".join(frames))
    write_parquet(folder / "table.parquet", texts)
    return [plain, *(str(folder / name) for name in ("packed.jsonl.gz", "packed.jsonl.zst", "table.parquet"))]


@pytest.mark.parametrize("unit_num_bytes", [13, 100, 1000, 1 << 22])
def test_formats_and_unit_sizes_agree(tmp_path, many_texts, write_jsonl, monkeypatch, unit_num_bytes):
    monkeypatch.setattr(corpus_units, "UNIT_NUM_BYTES", unit_num_bytes)
    for path in write_all_formats(tmp_path, many_texts, write_jsonl):
        assert list(documents([path])) == many_texts, path
        corpus = open_corpus([path])
        units, again = list(corpus.units()), list(corpus.units())
        assert [unit.digest for unit in units] == [unit.digest for unit in again]
        assert len({unit.digest for unit in units}) == len(units)
        assert sum(unit.num_input_bytes for unit in units) <= corpus.num_input_bytes
        assert (len(units) > 10) == (unit_num_bytes <= 1000)


def test_last_line_without_newline_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n  \n{"text": "two"}')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert list(documents([str(tmp_path / name)])) == ["one", "two"]


def test_folder_is_read_in_sorted_order_and_inputs_in_given_order(tmp_path, write_jsonl):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write_jsonl(tmp_path / name, [name])
    (tmp_path / "notes.pdf").write_text("ignored")
    assert list(documents([str(tmp_path)])) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    given = [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]
    assert list(documents(given)) == ["b.jsonl", "a.jsonl"]


def test_text_files_and_paragraphs(tmp_path):
    text = "first line\nsecond\n\n \nnext paragraph\r\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(documents([str(tmp_path / "a.txt")])) == [text]
    assert list(documents([str(tmp_path)], paragraphs=True)) == ["first line\nsecond\n", "next paragraph\r\n"]


def test_other_text_key(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["x", "y"], key="content")
    assert list(documents([path], text_key="content")) == ["x", "y"]
    with pytest.raises(BitLMError, match=r"a.jsonl line 1: no key 'text' \(found: id, content\)"):
        list(documents([path]))
    write_parquet(tmp_path / "a.parquet", ["x"], key="content")
    assert list(documents([str(tmp_path / "a.parquet")], text_key="content")) == ["x"]
    with pytest.raises(BitLMError, match="no column 'text'"):
        list(documents([str(tmp_path / "a.parquet")]))


@pytest.mark.parametrize("broken", ['{"text": "cut', '["a", "list"]', '{"text": 5}', '{"other": "x"}'])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("unit_num_bytes", [64, 1 << 22])
def test_broken_line_is_named(tmp_path, monkeypatch, broken, compressed, unit_num_bytes):
    monkeypatch.setattr(corpus_units, "UNIT_NUM_BYTES", unit_num_bytes)
    lines = [json.dumps({"text": f"document {i}"}) for i in range(40)]
    lines[28] = broken
    content = "\n".join(lines).encode()
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(BitLMError, match=rf"{path.name} line 29\b"):
        list(documents([str(path)]))


def test_unreadable_files_are_named(tmp_path, write_jsonl):
    whole = gzip.compress((json.dumps({"text": "x" * 5000}) + "\n").encode() * 50)
    cases = {
        "cut.jsonl.gz": whole[: len(whole) // 2],
        "no.jsonl.zst": b"nothing",
        "no.parquet": b"PAR1 nothing",
    }
    cases["latin.txt"] = b"ok\ncaf\xe9"
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BitLMError, match=name):
            list(documents([str(tmp_path / name)]))
    (tmp_path / "x.docx").write_text("")
    (tmp_path / "empty").mkdir()
    for name, reason in {
        "x.docx": "unknown kind",
        "missing.jsonl": "no such file",
        "empty": "no JSONL",
    }.items():
        with pytest.raises(BitLMError, match=f"{name}: {reason}"):
            open_corpus([str(tmp_path / name)])
    with pytest.raises(BitLMError, match="nothing to read"):
        open_corpus([])
    with pytest.raises(BitLMError, match="installed-docs"):
        open_corpus([], corpus="wikipedia")


def test_null_in_parquet_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x", None, "y"])
    with pytest.raises(BitLMError, match="a.parquet row 1"):
        list(documents([str(tmp_path / "a.parquet")]))


def test_lone_surrogates_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    assert list(documents([str(tmp_path / "a.jsonl")])) == ["a\ufffdb 🙂"]
    assert repaired("plain é") == "plain é"


def test_hub_loader_on_a_local_folder(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", ["one", "two"])
    assert list(documents([f"hub:{tmp_path / 'data'}"])) == ["one", "two"]
    assert list(documents([f"hub:{tmp_path / 'data'}:train"])) == ["one", "two"]
    with pytest.raises(BitLMError, match="row 0: no text under 'body'"):
        list(documents([f"hub:{tmp_path / 'data'}"], text_key="body"))
    with pytest.raises(BitLMError, match="cannot be loaded"):
        list(documents([f"hub:{tmp_path / 'nothing'}"]))


# ------------------------------------------------------------------------------------------ installed docs

LONG = "A docstring that is certainly longer than forty characters."
SOURCE = f'''"""{LONG} Module."""
import nothing_that_exists

class C:
    """{LONG} Class.

        Indented.
    """
    def method(self):
        """Too short."""
    if True:
        async def other(self):
            """{LONG} Conditional."""

def f():
    """{LONG} Class.

        Indented.
    """
    try:
        pass
    except ValueError:
        def inner():
            r"""{LONG} Inner \\d."""
'''


def fake_environment(root, monkeypatch, folder_order):
    for name in folder_order:
        (root / name).mkdir(parents=True)
        (root / name / "mod.py").write_text(SOURCE.replace("Module", f"Module {name}"))
    for skipped in ("p0/tests", "p0/__pycache__", "megatron_bitlm"):
        (root / skipped).mkdir(parents=True)
        (root / skipped / "hidden.py").write_text(f'"""{LONG} Hidden."""')
    (root / "p0" / "broken.py").write_text(f'"""{LONG} Broken."""\ndef (')
    paths = {"stdlib": str(root), "purelib": str(root), "platlib": str(root)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)


def test_installed_docs_are_exact(tmp_path, monkeypatch):
    fake_environment(tmp_path / "here", monkeypatch, ["p0", "p1", "p2"])
    found = installed_docs.installed_docs(1)
    common = [f"{LONG} Class.\n\nIndented.", f"{LONG} Conditional.", f"{LONG} Inner \\d."]
    modules = sorted(["p0", "p1", "p2"], key=lambda name: hashlib.sha256(f"{name}/mod.py".encode()).digest())
    expected = [f"{LONG} Module {modules[0]}.", *common, *(f"{LONG} Module {name}." for name in modules[1:])]
    assert found == expected


def test_installed_docs_do_not_depend_on_place_order_or_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(installed_docs, "_BATCH_NUM_MODULES", 2)
    names = [f"p{i}" for i in range(9)]
    fake_environment(tmp_path / "here", monkeypatch, names)
    first = installed_docs.installed_docs(1)
    fake_environment(tmp_path / "some" / "where" / "else", monkeypatch, names[::-1])
    assert installed_docs.installed_docs(2) == first
    assert list(documents([], corpus="installed-docs", num_workers=2)) == first
    limited = installed_docs.installed_docs(2, max_num_bytes=400)
    assert limited == first[: len(limited)] and sum(len(t.encode()) for t in limited) <= 400 < len(" ".join(first))
