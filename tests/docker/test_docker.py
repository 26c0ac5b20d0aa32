"""The images' recipes name files that exist and reach the build; `make checks` lints the recipes themselves."""

import fnmatch
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def helper():
    spec = importlib.util.spec_from_file_location("absent_constraints", ROOT / "docker" / "absent_constraints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_copied_files_exist_and_are_not_ignored(name):
    recipe = (ROOT / "docker" / name).read_text()
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#!"]
    kept = [line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert ignored[0] == "*"
    sources = [
        source for line in re.findall(r"^COPY (.+)$", recipe, flags=re.MULTILINE) for source in line.split()[:-1]
    ]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source.rstrip("/"), f"{keep}*") for keep in kept), f"{source} is ignored"


def test_packages_of_the_base_image_are_left_alone():
    lines = ["# comment", "", "torch==2.13.0", 'Flash_Attn==2.8; python_version >= "3.11"', "tiktoken==0.12.0"]
    assert helper().absent_constraints(lines, {"torch", "flash-attn"}) == ["tiktoken==0.12.0"]


def test_every_pin_of_the_project_is_read():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = helper().absent_constraints(lines, set())
    assert len(pins) > 50
    assert helper().absent_constraints(lines, {"torch"}) == [pin for pin in pins if not pin.startswith("torch==")]
