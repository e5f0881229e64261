"""Runs side by side: whole ones, one that was cut off, and folders that are none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from gazelle.__main__ import main
from gazelle.train.compare import draw, read_runs, table


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A run that ended, and one that was killed while it wrote a line."""
    made = []
    for name, rate, losses, killed in (("a", 1e-3, (4.0, 2.0, 2.5), False), ("b", 2e-3, (4.0, 3.0), True)):
        folder = tmp_path / name / "out"
        folder.mkdir(parents=True)
        lines = []
        for step, loss in enumerate(losses, 1):
            lines.append({"step": step, "loss": loss, "learning_rate": rate, "tokens_per_second": 1000.0 + 500 * step,
                          "peak_memory_gb": 1.5})
            lines.append({"step": step, "eval_loss": loss + 1, "eval_perplexity": 9.0, "eval_chrf": 10.0 * step,
                          "eval_runtime": 1.0})
        if not killed:
            lines.append({"step": 3, "train_runtime": 12.5, "train_loss": 3.0})
            run = {"train": "/somewhere/rows.jsonl", "facts": [["parameters trained", "1 M"]],
                   "settings": [["learning_rate", str(rate)], ["seed", "42"]]}
            (folder / "gazelle.json").write_text(json.dumps({"run": run}))
        text = "\n".join(map(json.dumps, lines)) + ('\n{"step": 3, "lo' if killed else "")
        (folder / "metrics.jsonl").write_text(text)
        rank = 8 if killed else 4
        (folder / "recipe.yaml").write_text(f"model: {{name: m}}\nlora: {{r: {rank}}}\noutput_dir: {name}\n")
        made.append(folder)
    return made[0], made[1]


def test_table(folders: tuple[Path, Path]) -> None:
    rows = dict(table(read_runs(folders)))
    assert rows["steps"] == ["3", "2 (not ended)"]
    assert rows["training loss"] == ["2.5", "3"] and rows["least training loss"] == ["2", "3"]
    assert rows["evaluation loss"] == ["3.5", "4"] and rows["best evaluation loss"] == ["3", "4"]
    assert rows["best evaluation chrf"] == ["30", "20"] and rows["evaluation perplexity"] == ["9", "9"]
    assert rows["tokens per second"] == ["2,000", "1,750"] and rows["peak memory, GB"] == ["1.5", "1.5"]
    assert rows["training time, s"] == ["12.5", "-"] and rows["data"] == ["rows.jsonl", "-"]
    assert rows["lora.r"] == ["4", "8"] and "model.name" not in rows and "output_dir" not in rows
    assert rows["learning_rate"] == ["0.001", "-"]


def test_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(folder) for folder in folders]
    assert main(["compare", *names, "--plot", str(tmp_path / "new" / "c.png"), "--html", str(tmp_path / "c.html")]) == 0
    printed = capsys.readouterr().out
    assert "a/out" in printed and "b/out" in printed and "2 (not ended)" in printed
    picture = matplotlib.image.imread(tmp_path / "new" / "c.png")
    assert picture.shape[0] > 400 and picture.std() > 0.02
    page = (tmp_path / "c.html").read_text()
    assert "<th>lora.r</th><td>4</td><td>8</td>" in page and page.count("<svg") == 1 and "src=" not in page
    assert main(["compare", *names, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [run["figures"]["training loss"] for run in read] == [2.5, 3.0]


def test_curves_are_those_of_the_files(folders: tuple[Path, Path]) -> None:
    panels = draw(read_runs(folders)).axes
    drawn = [[(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines] for axes in panels]
    assert drawn[0] == [([1, 2, 3], [4.0, 2.0, 2.5]), ([1, 2], [4.0, 3.0])]
    assert drawn[1] == [([1, 2, 3], [5.0, 3.0, 3.5]), ([1, 2], [5.0, 4.0])]
    assert drawn[2] == [([1, 2, 3], [1e-3] * 3), ([1, 2], [2e-3] * 2)]
    assert panels[0].lines[0].get_color() == panels[1].lines[0].get_color() != panels[0].lines[1].get_color()


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda folder: folder / "nowhere", "no such folder"),
    (lambda folder: folder.parent, "no metrics.jsonl"),
    (lambda folder: folder, "named twice"),
    (lambda folder: (folder.parent / "metrics.jsonl").write_text("3\n") and folder.parent, "no log entry"),
])
def test_folders_that_are_no_runs(folders: tuple[Path, Path], spoil: Callable[[Path], Any], said: str,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(folders[0]), str(spoil(folders[0]))]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_other_peoples_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN as Python writes it is no number here; what cannot be read is named, and nothing is drawn."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "eval_matrix": [1, 2]}\n'
                                            '{"step": 2, "loss": NaN}\n{"step": 2, "eval_loss": Infinity}\n')
    assert main(["compare", str(tmp_path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["figures"]
    assert figures["training loss"] == 2 and "evaluation loss" not in figures
    (tmp_path / "sub.png").mkdir()
    for options, said in ((["--plot", str(tmp_path / "sub.png")], "not a file of this kind"),
                          (["--plot", str(tmp_path / "a.pdf")], "ends in .png"),
                          (["--html", str(tmp_path / "a.png")], "ends in .html")):
        assert main(["compare", str(tmp_path), *options]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and not captured.out
    for name, content in (("gazelle.json", b'{"run": {"settings": [1, 2]}}'),
                          ("gazelle.json", b'{"run": {"facts": 3}}'),
                          ("metrics.jsonl", b"\xff\xfe\n"), ("metrics.jsonl", b'{"step": 1, "loss": "x"}\n')):
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        (tmp_path / name).write_bytes(content)
        assert main(["compare", str(tmp_path)]) == 2
        assert name in capsys.readouterr().err
        (tmp_path / name).write_bytes(kept)
