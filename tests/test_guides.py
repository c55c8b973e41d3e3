"""The guides' code runs as it stands: every block of a page, one after the other."""

import pathlib
import re

import pytest

GUIDES = sorted(pathlib.Path(__file__).parents[1].joinpath("docs", "guides").glob("*.md"))


@pytest.mark.filterwarnings("ignore:The target was reached")
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_code_of_a_guide_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    if page.stem == "defaults":
        printed = capsys.readouterr().out
        assert "at the end" in printed
        assert "depthwise kernels" in printed
        assert "criterion: taylor" in printed
