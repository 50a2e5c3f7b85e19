"""`eval`: what it counts is what `run` answers; baselines; refusals."""

import json

import pytest

from edgeprompt import load_prompt
from edgeprompt.hard_prompt import few_shot_text, hard_prompt

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
    assert "accuracy is for labels" in refused(
        "eval", tiny_llama_package, data, "--prompt", story, "--metric", "accuracy"
    )
    assert "no column 'target'; it has text, label" in refused("eval", tiny_llama_package, data, "--prompt", story)
    other = tmp_path / "other.csv"
    other.write_text("text,label\nfine,positive\nhm,neutral\n")
    line = refused("eval", tiny_llama_package, other, "--prompt", sentiment)
    assert "row 2: label 'neutral' is none that prompt 'sentiment' knows: negative, positive" in line
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
