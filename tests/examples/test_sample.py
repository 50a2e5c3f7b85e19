"""The committed sample of the data keeps the split: no held-out sentence in training, none of the unseen bucket."""

import csv
import importlib.util
import io
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
spec = importlib.util.spec_from_file_location("fetch", DATA / "fetch.py")
fetch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fetch)


@pytest.mark.parametrize("name", ["movie", "source"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_sample_is_of_its_part_and_balanced(name, part):
    with (DATA / f"{name}.{part}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == fetch.SAMPLE[part]
    assert {fetch.split(row["text"]) for row in rows} == {part}
    labels = [row["label"] for row in rows]
    assert len({labels.count(label) for label in set(labels)}) == 1


def test_ratings_are_read_by_line_and_keep_odd_characters():
    lines = io.StringIO("1\t-1.5\tit\x85 is bad \r\n2\t2\tgood\n")
    assert list(fetch.read_ratings(lines)) == [("it\x85 is bad", -1.5), ("good", 2.0)]


def test_files_of_others_are_not_written_over(tmp_path):
    """`--out` used to write over whatever had the name."""
    mine, other = tmp_path / "movie.test.csv", tmp_path / "news.test.csv"
    rows = {mine: [("a", "positive")], other: [("b, c", "negative")]}
    fetch.save(rows, force=False)
    assert other.read_text("utf-8") == 'text,label\n"b, c",negative\n'
    fetch.save(rows, force=False)  # the same once more
    other.write_text("my notes")
    mine.unlink()
    with pytest.raises(SystemExit, match=r"news\.test\.csv hold something else"):
        fetch.save(rows, force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["news.test.csv"]
    fetch.save(rows, force=True)
    assert "negative" in other.read_text("utf-8")
