"""What a 16-token prompt keeps of an instruction with eight solved examples.

    python -m benchmarks.quality.distil [--base smollm2|gemma3] [--task sentiment|source] [--seeds 5] [--texts 1000]
        [--steps 120] [--limit N]

The instruction with the best of five draws of its examples (by the dev set) is the teacher, in full precision, and
balanced over the texts without labels (`--balance-teacher` of `tune`). Its
distillates, one for each seed, learn from texts without labels for a package of the base: int4, or Gemma's own blocks.
That package serves them. Beside them: zero-shot and the instruction itself on that package, a prompt tuned with the
texts' labels, and LoRA (r 8, PEFT, the same texts with labels and steps, in PyTorch float). Figures are on the test
set; what exists under work/ is taken from there, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line
from edgeprompt import load, load_prompt
from edgeprompt.evaluation.data import read_records
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.hard_prompt import hard_prompt, teacher_prompt
from edgeprompt.prompts.template import Template
from edgeprompt.tuning import Distillation, TuneOptions, tune
from edgeprompt.tuning.answers import AnswerFile, LabelAnswer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import GEMMA3, SMOLLM2, WORK, model_file, package  # noqa: E402

SHOTS = 8
BASES = {"smollm2": (SMOLLM2, "int4"), "gemma3": (GEMMA3, "gguf")}
"""Model, and the precision of the package that serves it: what its file holds needs 4 bits, or some 8."""
TASKS: Mapping[str, dict[str, Any]] = {
    "sentiment": {
        "data": "movie",
        "instruction": "Decide whether the sentiment of each film review is negative or positive."
        "\n\n{text}\nSentiment:",
        "verbalizer": {"negative": (" negative",), "positive": (" positive",)},
        "learning_rate": 0.03,
    },
    "source": {
        "data": "source",
        "instruction": "Say where each sentence is from: a movie review, a product review, a tweet or the news."
        "\n\n{text}\nSource:",
        "verbalizer": {"movie": (" movie",), "product": (" product",), "tweets": (" tweet",), "news": (" news",)},
        "learning_rate": 0.01,
    },
}
CHUNK = 1024


class Benchmark:
    """One task's runs, each kept under work/distil/."""

    def __init__(self, task: str, options: argparse.Namespace) -> None:
        self.task, self.options, self.recipe = task, options, TASKS[task]
        self.model, self.precision = BASES[options.base]
        self.folder = (
            WORK
            / "distil"
            / f"{options.base}-{task}-{options.texts}-{options.steps}{'' if options.balance else '-plain'}"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.package = package(self.precision, self.model)
        rows = list(read_records(WORK / "data" / f"{self.recipe['data']}.train.csv"))
        random.Random(0).shuffle(rows)
        self.pool, self.texts = rows[:240], rows[240 : 240 + options.texts]
        dev = list(read_records(WORK / "data" / f"{self.recipe['data']}.dev.csv"))
        test = list(read_records(WORK / "data" / f"{self.recipe['data']}.test.csv"))
        random.Random(0).shuffle(dev)
        random.Random(0).shuffle(test)
        self.dev, self.test = dev[: options.dev], test[: options.limit]
        self.base = TuneOptions(
            verbalizer=self.recipe["verbalizer"],
            learning_rate=self.recipe["learning_rate"],
            steps=options.steps,
            eval_steps=options.steps,
            max_length=96,
            package=self.package,
        )

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A result under `name`, computed where it is not there yet."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            started = time.perf_counter()
            found = {"result": make(), "seconds": round(time.perf_counter() - started)}
            file.write_text(json.dumps(found))
            print(f"{self.task}: {name} took {found['seconds']} s", flush=True)
        return json.loads(file.read_text())["result"]

    def teacher(self, draw: int) -> Distillation:
        """The instruction with one draw of its examples."""
        return Distillation(
            self.recipe["instruction"],
            shots=SHOTS,
            shots_from=self.pool,
            shots_seed=draw,
            balance=self.options.balance,
        )

    def said(self, name: str, rows: Sequence[Mapping[str, Any]], draw: int) -> list[list[float]]:
        """The teacher's log-probabilities [rows, labels]; one step of a student brings them about."""
        file = self.folder / f"{name}-{draw}.teacher.jsonl"
        prompt = self.folder / f"{name}-{draw}.safetensors"

        def make() -> list[list[float]]:
            asked = replace(self.teacher(draw), answers=file)
            one = replace(self.base, steps=1, eval_split=0.0, package=None, distil=asked)
            tune(model_file(self.model), [{"text": row["text"]} for row in rows], output=prompt, options=one)
            head = json.loads(file.read_text().splitlines()[0])
            signature = {key: value for key, value in head.items() if key not in ("format", "version")}
            answers = AnswerFile(file, signature).read(LabelAnswer, CHUNK)
            return [answer.logprobs.tolist() for answer in answers if isinstance(answer, LabelAnswer)]

        found: list[list[float]] = self.kept(f"{name}-{draw}", make)
        return found

    def chosen(self, said: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> list[int]:
        """Label indices, where the teacher is balanced over the texts that `others` are answers to."""
        mean = [statistics.mean(column) if self.options.balance else 0.0 for column in zip(*others, strict=True)]
        return [max(range(len(row)), key=lambda label: row[label] - mean[label]) for row in said]

    def right(self, said: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """Which answers are right."""
        labels = list(self.recipe["verbalizer"])
        return [int(labels[one] == row["label"]) for one, row in zip(said, rows, strict=True)]

    def served(self, prompt: PromptFile) -> list[int]:
        """What the int4 package says of the test set, as label indices."""
        labels = list(self.recipe["verbalizer"])
        with load(self.package) as runtime:
            runtime.add_prompt(prompt, name="p")
            found = runtime.classify([row["text"] for row in self.test], prompt="p")
        return [labels.index(answer.label) for answer in found]

    def student(self, seed: int, draw: int) -> Path:
        """A distillate."""
        path = self.folder / f"student-{seed}.safetensors"
        if not path.exists():
            asked = replace(self.teacher(draw), answers=self.folder / f"texts-{draw}.teacher.jsonl")
            options = replace(self.base, seed=seed, distil=asked)
            tune(model_file(self.model), [{"text": row["text"]} for row in self.texts], output=path, options=options)
        return path

    def labelled(self, seed: int) -> Path:
        """A prompt that was tuned with the texts' labels."""
        path = self.folder / f"labelled-{seed}.safetensors"
        if not path.exists():
            template = "{prompt}" + self.recipe["instruction"].partition("\n\n")[2]
            options = replace(self.base, seed=seed, template=template)
            tune(model_file(self.model), list(self.texts), output=path, options=options)
        return path

    def served_labelled(self, seed: int) -> list[int]:
        """What the package says with such a prompt."""
        return self.served(load_prompt(self.labelled(seed)))

    def lora(self, seed: int) -> list[int]:
        """What LoRA says of the test set, in PyTorch float."""
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        from edgeprompt.base.geometry import geometry_of, tokens_of
        from edgeprompt.base.load import load_base
        from edgeprompt.tuning.encoding import RecordEncoder
        from edgeprompt.tuning.examples import BatchPlan, Examples, sorted_batches
        from edgeprompt.tuning.objectives import WordClassify
        from edgeprompt.tuning.prepare import prompted, read_tokenizer
        from edgeprompt.tuning.teacher import FixedPrompt

        torch.manual_seed(seed)
        loaded = load_base(model_file(self.model))
        geometry = geometry_of(loaded.config)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        inject_adapter_in_model(config, loaded.model)
        trained = [value for name, value in loaded.model.named_parameters() if "lora_" in name]
        tokens = tokens_of(loaded.config, loaded.model.generation_config, loaded.tokenizer)
        template = Template.parse(self.recipe["instruction"].partition("\n\n")[2])
        nothing = FixedPrompt(torch.zeros(0, geometry.hidden_size), is_prefix=False)
        model = prompted(loaded, Template.parse("{text}{prompt}"), geometry, nothing, tokens)
        encoder = RecordEncoder(
            architecture=loaded.family.architecture,
            template=template,
            tokenizer=read_tokenizer(loaded, geometry.vocab_size),
            options=self.base,
            num_virtual_ids=0,
            prefix_length=0,
            vocab_size=geometry.vocab_size,
        )
        objective = WordClassify(model, encoder, self.recipe["verbalizer"])
        examples = Examples(objective.encode(row, "a text") for row in self.texts)
        import numpy as np

        plan = BatchPlan(np.arange(len(examples)), examples.lengths, self.base.batch_size, seed)
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        for step in range(self.options.steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 6) * (1 - 0.9 * step / self.options.steps)
            optimizer.zero_grad()
            outcome = objective.measure([examples[index] for index in plan.batch(step)])
            (outcome.loss / outcome.count).backward()
            optimizer.step()
        test = Examples(objective.encode(row, "a text") for row in self.test)
        said = [0] * len(test)
        with torch.no_grad():
            for batch in sorted_batches(np.arange(len(test)), test.lengths, 32):
                scores = objective.scores([test[index].ids for index in batch])
                for index, label in zip(batch, scores.argmax(-1).tolist(), strict=True):
                    said[index] = label
        return said

    def run(self) -> dict[str, Any]:
        """All figures."""
        draws: dict[int, float] = {}
        for draw in range(self.options.draws):
            said = self.said("dev", self.dev, draw)
            draws[draw] = statistics.mean(self.right(self.chosen(said, said), self.dev))
        best = max(draws, key=lambda draw: draws[draw])
        on_test, on_texts = self.said("test", self.test, best), self.said("texts", self.texts, best)
        teacher = self.chosen(on_test, on_texts)
        rows: dict[str, list[list[int]]] = {"teacher (instruction, float)": [teacher]}
        if self.options.balance:
            plain = [max(range(len(row)), key=row.__getitem__) for row in on_test]
            rows["teacher, not balanced"] = [plain]
        seeds = range(self.options.seeds)
        paths = [self.student(seed, best) for seed in seeds]
        about = load_prompt(paths[0]).distilled_from
        student = load_prompt(paths[0])
        zero = hard_prompt(student, "", name="zero")
        rows[f"zero-shot, {self.precision}"] = [self.kept("zero", partial(self.served, zero))]
        if self.options.served_instruction:
            teaching = teacher_prompt(student, name="hard")
            rows[f"instruction, {self.precision}"] = [self.kept("hard", partial(self.served, teaching))]
        rows[f"distillate, {self.precision}"] = [
            self.kept(f"served-student-{seed}", partial(self.served, load_prompt(path)))
            for seed, path in zip(seeds, paths, strict=True)
        ]
        if self.options.labelled:
            rows[f"tuned with labels, {self.precision}"] = [
                self.kept(f"served-labelled-{seed}", partial(self.served_labelled, seed)) for seed in seeds
            ]
        if self.options.lora:
            rows["LoRA r 8 with labels, float"] = [
                self.kept(f"lora-{seed}", partial(self.lora, seed)) for seed in seeds
            ]
        table = {}
        for name, runs in rows.items():
            accuracy = [100 * statistics.mean(self.right(said, self.test)) for said in runs]
            agree = [100 * statistics.mean(int(a == b) for a, b in zip(said, teacher, strict=True)) for said in runs]
            table[name] = {"accuracy": accuracy, "agreement": agree}
        return {
            "rows": table,
            "n": len(self.test),
            "dev": len(self.dev),
            "dev_accuracy_of_draws": draws,
            "instruction_tokens": about["instruction_tokens"],
            "num_virtual_tokens": about["num_virtual_tokens"],
            "first_token": about["first_token"],
            "steps": self.options.steps,
            "texts": len(self.texts),
        }


def spread(values: Sequence[float]) -> str:
    """Mean, and lowest to highest of several."""
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Run what is missing, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="smollm2")
    parser.add_argument("--task", choices=TASKS, default="sentiment")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--draws", type=int, default=5, help="draws of the examples, of which dev chooses one")
    parser.add_argument("--dev", type=int, default=256, help="dev sentences that choose the draw")
    parser.add_argument("--limit", type=int, help="test sentences (a random part)")
    for name in ("balance", "lora", "labelled", "served-instruction"):
        parser.add_argument(f"--no-{name}", dest=name.replace("-", "_"), action="store_false")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/distil-BASE-TASK.json")
    options = parser.parse_args()
    machine = describe()
    found = {"machine": machine, **Benchmark(options.task, options).run()}
    out = options.out or ROOT / "benchmarks" / "results" / f"distil-{options.base}-{options.task}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    what = f"{options.base}, {options.task}, n = {found['n']}"
    print(f"| {what} | accuracy | agreement with the teacher |\n| --- | --- | --- |")
    for name, row in found["rows"].items():
        print(f"| {name} | {spread(row['accuracy'])} | {spread(row['agreement'])} |")
    print(f"\n{found['instruction_tokens']} tokens against {found['num_virtual_tokens']}; {found['first_token']}")
    print(line(machine))


if __name__ == "__main__":
    main()
