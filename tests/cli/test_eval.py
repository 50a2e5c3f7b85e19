"""`eval`: what it counts is what `run` answers; baselines; refusals."""

import json

import numpy as np
import pytest

import edgeprompt
from edgeprompt import load_prompt, save_prompt
from edgeprompt.evaluation.metrics import score
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.file import Head, HeadStep
from edgeprompt.prompts.hard_prompt import few_shot_text, hard_prompt
from edgeprompt.prompts.template import Template
from tests.support.prompts import make_prompt

ROWS = [("A fine film.", "positive"), ("Dull and loud.", "negative"), ("So, so good", "positive"), ("No.", "negative")]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS * 20))
    return file


def test_accuracy_is_the_share_of_rights_answers(cli, tiny_llama_package, prompt_folder, data):
    prompt = prompt_folder / "sentiment.safetensors"
    answers = cli("run", tiny_llama_package, *(text for text, _ in ROWS), "--prompt", prompt).stdout.splitlines()
    right = sum(answer.split("\t")[0] == label for answer, (_, label) in zip(answers, ROWS, strict=True))
    result = cli("eval", tiny_llama_package, data, "--prompt", prompt, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["metric"] == "accuracy"
    assert found["n"] == 80
    assert found["value"] == right / 4
    assert set(found["per_label"]) == {"negative", "positive"}
    text = cli("eval", tiny_llama_package, data, "--prompt", prompt).stdout.splitlines()
    assert text[0].startswith(f"sentiment: accuracy {100 * right / 4:.1f} ± ")
    assert text[1].split() == ["label", "precision", "recall", "f1", "n"]
    assert [line.split()[0] for line in text[2:]] == ["negative", "positive"]


def test_baselines_stand_beside_the_prompt(cli, tiny_llama_package, prompt_folder, data):
    result = cli(
        *("eval", tiny_llama_package, data, "--prompt", prompt_folder / "sentiment.safetensors", "--limit", 8),
        *("--metric", "f1", "--zero-shot", "--hard-prompt", "Is it good?\n", "--shots", 4, "--shots-from", data),
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["sentiment", "zero-shot", "hard prompt", "4-shot hard prompt"]
    assert {(row["metric"], row["n"]) for row in rows} == {("f1", 8)}


def test_generation_is_compared_with_the_target(cli, tiny_llama_package, prompt_folder, tmp_path):
    story = prompt_folder / "story.safetensors"
    said = cli("run", tiny_llama_package, "Once upon", "--prompt", story, "--max-new-tokens", 6, "--json").stdout
    file = tmp_path / "data.jsonl"
    rows = [{"text": "Once upon", "target": json.loads(said)["text"].strip()}, {"text": "Once upon", "target": "zebra"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli(
        "eval", tiny_llama_package, file, "--prompt", story, "--metric", "exact-match", "--max-new-tokens", 6, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["value"] == 0.5


def test_refusals(cli, refused, tiny_llama_package, prompt_folder, data, tmp_path):
    sentiment, story = (prompt_folder / f"{name}.safetensors" for name in ("sentiment", "story"))
    assert "different tasks (classify, generate)" in refused(
        "eval", tiny_llama_package, data, "--prompt", sentiment, "--prompt", story
    )
    assert "metric accuracy does not fit task generate; use f1" in refused(
        "eval", tiny_llama_package, data, "--prompt", story, "--metric", "accuracy"
    )
    assert "no column 'target'; it has text, label" in refused("eval", tiny_llama_package, data, "--prompt", story)
    other = tmp_path / "other.csv"
    other.write_text("text,label\nfine,positive\nhm,neutral\n")
    line = refused("eval", tiny_llama_package, other, "--prompt", sentiment)
    assert "row 2: label 'neutral' is not a label of prompt 'sentiment' (negative, positive)" in line
    other.write_text("text,label\n")
    assert "is empty" in refused("eval", tiny_llama_package, other, "--prompt", sentiment)
    usage = cli("eval", tiny_llama_package, data, "--prompt", sentiment, "--shots", 3)
    assert usage.exit_code == 2
    assert "go together" in usage.stderr


def test_hard_prompts_are_the_template_in_words(prompt_folder):
    prompt = load_prompt(prompt_folder / "sentiment.safetensors")
    shots = few_shot_text(prompt, [({"text": "Braces {} stay"}, "negative"), ({"text": "Yes"}, "positive")])
    assert shots == "Braces {} stay\nSentiment: bad\n\nYes\nSentiment: good\n\n"
    few = hard_prompt(prompt, shots, name="few")
    assert few.num_virtual_tokens == 0
    assert few.verbalizer == prompt.verbalizer
    assert str(few.template) == shots.replace("{}", "{{}}") + "{text}\nSentiment:"
    assert str(hard_prompt(prompt, "", name="zero").template) == "{text}\nSentiment:"


@pytest.fixture(scope="module")
def encoder_prompts(encoder_package, tmp_path_factory):
    """An encoder's package, and a folder with a random prompt for each kind of task that has a head."""
    package, folder = encoder_package("BERT"), tmp_path_factory.mktemp("heads")
    manifest, rng = open_package(package).manifest, np.random.default_rng(0)
    for name, task, labels, problem in (
        ("genres", "classify", ("comedy", "drama", "war"), "multi_label"),
        ("stars", "classify", (), "regression"),
        ("names", "tag", ("B-PER", "O"), "single_label"),
        ("who", "qa", (), "single_label"),
    ):
        outputs = {"stars": 1, "who": 2}.get(name, len(labels))
        prompt = make_prompt(
            manifest,
            name,
            task=task,
            labels=labels,
            template=Template.parse("{prompt}{question}{context}" if task == "qa" else "{prompt}{text}"),
            head={"classifier.weight": rng.normal(0, 0.3, (outputs, 64)).astype(np.float32)},
            head_spec=Head("tokens" if task in ("tag", "qa") else "mean", (HeadStep("linear", "classifier"),), problem),
        )
        save_prompt(prompt, folder / f"{name}.safetensors")
    return package, folder


def evaluated(cli, encoder_prompts, tmp_path, name, rows):
    package, folder = encoder_prompts
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli("eval", package, file, "--prompt", folder / f"{name}.safetensors", "--json")
    assert result.exit_code == 0, result.stderr
    with edgeprompt.load(package) as runtime:
        prompt = runtime.add_prompt(folder / f"{name}.safetensors")
        texts = [row.get("text") or {key: row[key] for key in ("question", "context")} for row in rows]
        answers = runtime.run([edgeprompt.Request(text, prompt) for text in texts])
    return json.loads(result.stdout), answers


def test_several_labels_of_a_row_are_compared_as_a_set(cli, encoder_prompts, tmp_path):
    rows = [{"text": text, "label": ["drama", "comedy"] if "o" in text else ["war"]} for text, _ in ROWS]
    found, answers = evaluated(cli, encoder_prompts, tmp_path, "genres", rows)
    right = [set(answer.labels) == set(row["label"]) for answer, row in zip(answers, rows, strict=True)]
    assert (found["metric"], found["value"], found["n"]) == ("accuracy", sum(right) / 4, 4)
    said = sum("war" in answer.labels for answer in answers)
    both = sum("war" in answer.labels and "war" in row["label"] for answer, row in zip(answers, rows, strict=True))
    assert found["per_label"].get("war", {}).get("precision", 0) == (both / said if said else 0)


def test_numbers_have_a_mean_absolute_error(cli, encoder_prompts, tmp_path):
    rows = [{"text": text, "label": index - 1.5} for index, (text, _) in enumerate(ROWS)]
    found, answers = evaluated(cli, encoder_prompts, tmp_path, "stars", rows)
    errors = [abs(float(answer.label) - row["label"]) for answer, row in zip(answers, rows, strict=True)]
    assert found["metric"] == "mae"
    assert found["value"] == pytest.approx(np.mean(errors))
    assert found["per_label"] == {}


def test_tags_are_compared_word_by_word(cli, encoder_prompts, tmp_path):
    rows = [{"text": "Anna met Bob", "tokens": ["Anna", "met", "Bob"], "tags": ["B-PER", "O", "B-PER"]}] * 3
    found, answers = evaluated(cli, encoder_prompts, tmp_path, "names", rows)
    right = [word.label == tag for word, tag in zip(answers[0].words, rows[0]["tags"], strict=True)]
    assert (found["metric"], found["value"], found["n"]) == ("accuracy", sum(right) / 3, 9)


@pytest.mark.parametrize("column", ["answer", "answers"])
def test_questions_take_the_columns_that_tune_reads(column, cli, encoder_prompts, tmp_path):
    right = {"answer": "Anna", "answers": {"text": ["Anna"], "answer_start": [10]}}[column]
    rows = [{"question": "Who?", "context": "Yesterday Anna met Bob.", column: right}]
    found, answers = evaluated(cli, encoder_prompts, tmp_path, "who", rows)
    assert (found["metric"], found["n"]) == ("f1", 1)
    assert found["value"] == score("f1", [answers[0].text], ["Anna"]).value


@pytest.mark.parametrize("name", ["genres", "stars", "names", "who"])
def test_solved_examples_are_for_prompts_that_answer_in_text(name, refused, encoder_prompts, tmp_path):
    package, folder = encoder_prompts
    rows = {
        "genres": {"text": "a", "label": ["drama", "war"]},
        "stars": {"text": "a", "label": 1.5},
        "names": {"tokens": ["Anna", "met"], "tags": ["B-PER", "O"]},
        "who": {"question": "Who?", "context": "Anna met Bob.", "answers": {"text": ["Anna"], "answer_start": [0]}},
    }
    file = tmp_path / "data.jsonl"
    file.write_text((json.dumps(rows[name]) + "\n") * 4)
    prompt = folder / f"{name}.safetensors"
    error = refused("eval", package, file, "--prompt", prompt, "--shots", 2, "--shots-from", file)
    assert "answers through a trained head" in error


def test_a_wrong_path_is_told_before_the_model_is_loaded(refused, tiny_llama_package, prompt_folder, data, monkeypatch):
    def load(*args, **keywords):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(edgeprompt, "load", load)
    prompt = prompt_folder / "sentiment.safetensors"
    assert "no data file" in refused("eval", tiny_llama_package, "no.csv", "--prompt", prompt)
    assert "no prompt file" in refused("eval", tiny_llama_package, data, "--prompt", "no.safetensors")
    assert "no data file" in refused("run", tiny_llama_package, "--input", "no.csv", "--prompt", prompt)
    assert "no prompt file" in refused("run", tiny_llama_package, "text", "--prompt", "no.safetensors")


@pytest.mark.parametrize(
    ("name", "metric", "fits"), [("genres", "f1", "accuracy"), ("stars", "bleu", "mae"), ("names", "mae", "f1")]
)
def test_a_metric_that_does_not_fit_names_those_that_do(name, metric, fits, refused, encoder_prompts, data):
    package, folder = encoder_prompts
    error = refused("eval", package, data, "--prompt", folder / f"{name}.safetensors", "--metric", metric)
    assert f"metric {metric} does not fit" in error
    assert fits in error
