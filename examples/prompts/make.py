"""Train the prompts in this folder: `make prompts`, or `python examples/prompts/make.py NAME ...` for some.

Every prompt is made by one `edgeprompt tune` command, shown as it runs, against the weights of the package that will
serve it; its figure on held-out sentences, measured on that package, is stored in the file under `training`. A prompt
that lies under work/prompts/ already is not tuned again.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import MINILM, ROOT, SMOLLM2, WORK, Model, edgeprompt, edgeprompt_json, model_file, package

from edgeprompt import load_prompt, save_prompt

DATA = WORK / "data"
HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one prompt is made."""

    data: str
    """Stem of the data: DATA/{data}.train.csv and .dev.csv."""
    tune: tuple[object, ...]
    """Options of `edgeprompt tune`."""
    model: Model = SMOLLM2
    precision: str = "int4"
    """Of the package that the prompt is for."""
    metric: str = "accuracy"
    test: str | None = None
    """Stem of the test set, where it is another than `data`."""
    test_rows: int = 400
    """Most held-out rows that the prompt is measured on."""

    def files(self) -> tuple[Path, Path, Path]:
        """Training, dev and test file."""
        return (
            DATA / f"{self.data}.train.csv",
            DATA / f"{self.data}.dev.csv",
            DATA / f"{self.test or self.data}.test.csv",
        )

    def command(self, output: Path, *, seed: int = 0) -> tuple[object, ...]:
        """The `edgeprompt tune` command that makes the prompt."""
        train, dev, _ = self.files()
        target = () if self.precision == "fp32" else ("--for", package(self.precision, self.model))
        return ("tune", model_file(self.model), train, "-o", output, "--eval", dev, *target, *self.tune, "--seed", seed)


SENTIMENT = (
    *("--template", r"{prompt}{text}\nSentiment:"),
    *("--verbalizer", "negative= negative", "--verbalizer", "positive= positive"),
    *("--init-text", "Decide whether the sentiment of this text is negative or positive.\n"),
    *("--virtual-tokens", 16, "--steps", 70, "--max-length", 96),
)
SOURCE = (
    *("--template", r"{prompt}{text}\nSource:"),
    *("--verbalizer", "movie= movie", "--verbalizer", "product= product"),
    *("--verbalizer", "tweets= tweet", "--verbalizer", "news= news"),
    *("--init-text", "Where is this sentence from: a movie review, a product review, a tweet or the news?\n"),
    *("--virtual-tokens", 16, "--steps", 80, "--lr", 0.01, "--max-length", 96),
)
RESTORE = (
    *("--task", "generate", "--template", r"{prompt}{text}\nWritten:"),
    *("--init-text", "Write this sentence again with its capital letters and punctuation.\n"),
    *("--virtual-tokens", 16, "--steps", 60, "--lr", 0.01, "--max-length", 160),
)
MINILM_DEEP = (
    *("--method", "p-tuning-v2", "--virtual-tokens", 8),
    *("--steps", 600, "--lr", 0.005, "--max-length", 96),
)
RECIPES = {
    "sentiment": Recipe("movie", SENTIMENT, test_rows=1000),
    "source": Recipe("source", SOURCE),
    "restore": Recipe("restore", RESTORE, metric="bleu"),
    "minilm-sentiment": Recipe("sentiment", MINILM_DEEP, MINILM, "int8", test="movie"),
    "minilm-source": Recipe("source", MINILM_DEEP, MINILM, "int8"),
}


def make(name: str, recipe: Recipe) -> None:
    """Tune, measure on the test set, store the figure, and only then put the prompt into this folder."""
    folder, test = package(recipe.precision, recipe.model), recipe.files()[2]
    draft = WORK / "prompts" / f"{name}.safetensors"
    if not draft.exists():
        edgeprompt(*recipe.command(draft), "--log", WORK / "logs" / name)
    (score,) = edgeprompt_json(
        *("eval", folder, test, "--prompt", draft, "--metric", recipe.metric, "--limit", recipe.test_rows)
    )
    prompt = load_prompt(draft)
    measured = {key: score[key] for key in ("metric", "value", "standard_error", "n")}
    held_out = {"data": test.name, "precision": recipe.precision, **measured}
    training = {**prompt.training, "held_out": held_out}
    save_prompt(dataclasses.replace(prompt, name=name, training=training), HERE / draft.name)
    print(f"{(HERE / draft.name).relative_to(ROOT)}: {held_out}", flush=True)


def main() -> None:
    names = sys.argv[1:] or list(RECIPES)
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise SystemExit(f"no recipe {unknown[0]!r}; known: {', '.join(RECIPES)}")
    for name in names:
        make(name, RECIPES[name])


if __name__ == "__main__":
    main()
