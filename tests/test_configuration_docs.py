"""docs/configuration.md is what the code says."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_configuration_document_is_current() -> None:
    spec = importlib.util.spec_from_file_location("write_configuration", ROOT / "tools" / "write_configuration.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == tool.render(), "run: python tools/write_configuration.py"
    assert "| `samples_per_block` | `1` |" in written
