"""`tune`: from a data file to a prompt that the runtime serves, with clear refusals."""

import csv
import json
import random
import resource
import signal

import pytest

from edgeprompt import load, load_prompt
from edgeprompt.evaluation.data import read_records

WORDS = ["--verbalizer", "animal= a", "--verbalizer", "number= n"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 rows of toy text."""
    chosen, path = random.Random(0), tmp_path_factory.mktemp("data") / "toy.csv"
    vocabulary = {"animal": ["cat", "dog", "cow", "horse"], "number": ["one", "two", "three", "four"]}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(32):
            for label, words in vocabulary.items():
                writer.writerow([" ".join(chosen.choices(words, k=chosen.randint(2, 5))), label])
    return path


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "prefix-tuning"])
def test_the_runtime_answers_as_training_did(cli, tiny_llama_base, tiny_llama_package, data, tmp_path, method):
    out = tmp_path / "toy.safetensors"
    result = cli(
        *("tune", tiny_llama_base, data, "-o", out, "--method", method, *WORDS, "--template", r"{prompt}{text}\nIs:"),
        *("--virtual-tokens", 4, "--steps", 30, "--lr", 0.02 if method == "p-tuning" else 0.1, "--json"),
        *("--log", tmp_path / "log", "--adapter", tmp_path / "adapter"),
    )
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["path"] == str(out)
    assert facts["eval_accuracy"] >= 0.8
    assert facts["examples_per_second"] > 0
    assert (tmp_path / "adapter/adapter_config.json").exists()
    assert (tmp_path / "log/metrics.jsonl").exists()
    prompt = load_prompt(out)
    assert str(prompt.template).endswith("{text}\nIs:")
    with load(tiny_llama_package) as runtime:
        runtime.add_prompt(out)
        (answer,) = runtime.classify([prompt.golden.fields["text"]], prompt="toy")
        texts, labels = zip(*((row["text"], row["label"]) for row in read_records(data)), strict=True)
        right = sum(a.label == label for a, label in zip(runtime.classify(texts, prompt="toy"), labels, strict=True))
    assert answer.label == prompt.golden.label
    assert answer.logits == pytest.approx(prompt.golden.logits, abs=1e-3)
    assert right / len(texts) >= 0.8


def test_text_output_says_what_was_made(cli, tiny_llama_base, data, tmp_path):
    result = cli("tune", tiny_llama_base, data, "-o", tmp_path / "a.safetensors", "--steps", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'a.safetensors'}: 16 virtual tokens, ")
    assert "eval_accuracy: " in result.stdout
    assert result.stderr == ""


def test_wrong_work_is_one_line_and_leaves_nothing(refused, tiny_llama_base, data, tmp_path):
    out = tmp_path / "out" / "a.safetensors"
    assert "has neither a column 'kind'" in refused("tune", tiny_llama_base, data, "-o", out, "--label-column", "kind")
    assert "no data file at" in refused("tune", tiny_llama_base, tmp_path / "no.csv", "-o", out)
    assert "no base model at" in refused("tune", tmp_path / "no", data, "-o", out)
    assert "label 'number' has no verbalizer word" in refused(
        "tune", tiny_llama_base, data, "-o", out, "--verbalizer", "animal= a", "--verbalizer", "x= x"
    )
    assert "no package folder" in refused("tune", tiny_llama_base, data, "-o", out, "--for", tmp_path / "no")
    assert "must end in .safetensors" in refused("tune", tiny_llama_base, data, "-o", tmp_path / "a.bin")
    assert not out.parent.exists()


def test_a_label_without_text_and_a_single_label_are_refused(refused, tiny_llama_base, data, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,\nb,number\n")
    out = tmp_path / "a.safetensors"
    assert "row 1 of" in refused("tune", tiny_llama_base, rows, "-o", out)
    assert "verbalizer names one label only" in refused(
        "tune", tiny_llama_base, data, "-o", out, "--verbalizer", "animal= a"
    )
    assert not out.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(spawn, tiny_llama_base, data, tmp_path):
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))

    # Examples are spooled to a temporary file too, so only few of them.
    out = tmp_path / "a.safetensors"
    with spawn("tune", tiny_llama_base, data, "-o", out, "--steps", 2, "--shots", 4, preexec_fn=small_files) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [["--method", "lora"], ["--steps", "0"], ["--verbalizer", "positive"], ["--lr", "-1"], ["--init", "magic"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(cli, tiny_llama_base, data, tmp_path, wrong):
    result = cli("tune", tiny_llama_base, data, "-o", tmp_path / "a.safetensors", *wrong)
    assert result.exit_code == 2
    assert wrong[0] in result.stderr


@pytest.mark.parametrize("wrong", ["base", "data", "package", "no package", "checkpoint", "no checkpoint", "prompt"])
def test_a_wrong_path_is_told_before_anything_heavy_is_imported(spawn, tiny_llama_base, data, tmp_path, wrong):
    base, table, options = tiny_llama_base, data, {}
    missing, notes = tmp_path / "missing", tmp_path / "notes"
    notes.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    if wrong == "base":
        base, said = missing, f"no base model at '{missing}'"
    elif wrong == "data":
        table, said = missing.with_suffix(".csv"), "no data file at"
    elif wrong == "package":
        options, said = {"--for": missing}, f"no package folder at '{missing}'"
    elif wrong == "no package":
        options, said = {"--for": notes}, "is no package: it has no"
    elif wrong == "checkpoint":
        options, said = {"--resume": missing}, f"cannot go on from '{missing}': No such file"
    elif wrong == "no checkpoint":
        options, said = {"--resume": tmp_path / "notes.txt"}, "no checkpoint of edgeprompt tune"
    else:
        options, said = {"--resume": missing.with_suffix(".safetensors")}, "cannot read prompt file"
    heavy = "sorted({'torch', 'peft', 'transformers'} & set(sys.modules))"
    before = f"import sys, atexit; atexit.register(lambda: print({heavy}))"
    given = [item for pair in options.items() for item in pair]
    process = spawn("tune", base, table, "-o", tmp_path / "a.safetensors", *given, before=before)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
    assert out.strip() == "[]"


def test_help_imports_nothing_heavy(spawn):
    heavy = "sorted({'torch', 'peft', 'transformers'} & set(sys.modules))"
    process = spawn("tune", "--help", before=f"import sys, atexit; atexit.register(lambda: print({heavy}))")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "--virtual-tokens" in out
    assert out.splitlines()[-1] == "[]"
