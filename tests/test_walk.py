"""The walk of a record through the code: README shows what the command prints, and what it prints is so."""
import importlib
import os
import re

import pytest
from conftest import ROOT

from tools import walk


@pytest.fixture(scope="module")
def printed():
    return walk.walk()


def test_readme_shows_what_the_command_prints(printed, tmp_path):
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        readme = f.read()
    copy = tmp_path / "copy.md"
    copy.write_text(readme, encoding="utf-8")
    walk.put(printed, str(copy))
    assert copy.read_text(encoding="utf-8") == readme, "python -m tools.walk --readme README.md puts it right"
    assert max(map(len, printed.split("\n"))) <= 122 and len(printed.split("\n")) <= 90


def test_the_names_it_mentions_are_there(printed):
    names = set(re.findall(r"\b(?:lib|data|model|pretrain|sample)\.[\w.]*\w", printed))
    assert len(names) > 18
    for name in names:
        module, place = re.fullmatch(r"((?:lib\.)?\w+)\.(.+)", name).groups()
        found = importlib.import_module(module)
        for attribute in place.split("."):
            assert hasattr(found, attribute), f"{name}: tools/walk.py mentions what is not there"
            found = getattr(found, attribute)


def test_values_worked_out_by_hand(printed):
    """A loss weight of 1 for "Right", "." and the end of the answer, of 2 for 36 tokens of points and their end, of 1
    for "7" and its end; the circle half way between 0.4, 0.6 and 0.6, 0.5; 55 tokens of a trunk with four frames."""
    weights = 3 * 1 + (9 + 9 + 8 + 10 + 1) * 2 + 2 * 1
    assert f"/ sum of weights {weights} = loss 7." in printed and "at 0.75 s x 0.500, y 0.550" in printed
    trunk = 1 + 4 * (1 + 1 + 9 + 1) + (1 + 2 + 1 + 2)  # bos, four frames, their times
    assert re.findall(r"«user» +(\d) +(\d+) ", printed) == [("1", str(trunk)), ("2", str(trunk))]
    assert "windows" in printed and "[6, 7, -1, 14, 15, -1, 22, 23, -1]" in printed  # the right edge of 8 x 8 patches


@pytest.mark.parametrize("text", ["", "<!-- walk -->", "<!-- /walk --> <!-- walk -->",
                                  "<!-- walk --><!-- /walk --><!-- walk --><!-- /walk -->"])
def test_a_file_without_the_markers_is_left_alone(tmp_path, text, monkeypatch, capsys):
    path = tmp_path / "a.md"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["walk", "--readme", str(path)])
    monkeypatch.setattr(walk, "walk", lambda: "values")
    with pytest.raises(SystemExit) as end:
        walk.main()
    assert end.value.code == 2 and str(path) in capsys.readouterr().err and path.read_text() == text
