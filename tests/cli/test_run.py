"""`run`: texts from everywhere, answers to everywhere, and clear refusals."""

import csv
import json
import os
import shutil

import pytest

import edgeprompt
from edgeprompt import load_prompt, save_prompt

TEXTS = ["A fine film.", "Dull, long and loud.", "Néw ☃ characters"]


@pytest.fixture
def answers(cli, tiny_llama_package, prompt_folder):
    """Label and score of each text, one at a time: what every other way of asking must say."""
    found = []
    for text in TEXTS:
        result = cli("run", tiny_llama_package, text, "--prompt", prompt_folder / "sentiment.safetensors")
        assert result.exit_code == 0, result.stderr
        found.append(result.stdout)
    return found


def test_text_on_the_command_line(answers):
    for answer in answers:
        label, score = answer.rstrip("\n").split("\t")
        assert label in ("negative", "positive")
        assert 0.5 <= float(score) <= 1


@pytest.mark.parametrize("kind", ["args", "stdin", "txt", "csv", "tsv", "jsonl"])
def test_every_source_gives_the_same_answers(kind, cli, answers, tiny_llama_package, prompt_folder, tmp_path):
    common = ["run", tiny_llama_package, "--prompt", prompt_folder / "sentiment.safetensors"]
    file = tmp_path / f"texts.{kind}"
    if kind == "args":
        result = cli(*common, *TEXTS)
    elif kind == "stdin":
        result = cli(*common, stdin="\n".join(TEXTS) + "\n")
    else:
        if kind == "txt":
            file.write_text("".join(f"{text}\n" for text in TEXTS), "utf-8")
        elif kind == "jsonl":
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
        else:
            with file.open("w", encoding="utf-8", newline="") as handle:
                writer = csv.writer(handle, delimiter="," if kind == "csv" else "\t")
                writer.writerows([["id", "text"], *enumerate(TEXTS)])
        result = cli(*common, "--input", file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "".join(answers)


def test_json_has_scores_and_the_input(cli, answers, tiny_llama_package, prompt_folder):
    result = cli("run", tiny_llama_package, *TEXTS, "--prompt", prompt_folder / "sentiment.safetensors", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["input"] for row in rows] == TEXTS
    assert [row["prompt"] for row in rows] == ["sentiment"] * 3
    for row, answer in zip(rows, answers, strict=True):
        assert row["label"] == answer.split("\t")[0]
        assert sum(row["scores"].values()) == pytest.approx(1)


def test_several_prompts_answer_every_text_in_one_batch(cli, answers, tiny_llama_package, prompt_folder):
    result = cli(
        *("run", tiny_llama_package, *TEXTS, "--max-new-tokens", 4),
        *(
            part
            for name in ("sentiment", "topic", "story")
            for part in ("--prompt", prompt_folder / f"{name}.safetensors")
        ),
    )
    assert result.exit_code == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["sentiment", "topic", "story"] * 3
    assert ["\t".join(line[1:]) + "\n" for line in lines[::3]] == answers


def test_a_column_names_the_prompt_of_each_row(cli, tiny_llama_package, prompt_folder, tmp_path):
    file = tmp_path / "mixed.csv"
    file.write_text("body,task\nA fine film.,topic\nA fine film.,sentiment\n")
    prompts = [part for name in ("sentiment", "topic") for part in ("--prompt", prompt_folder / f"{name}.safetensors")]
    common = ["run", tiny_llama_package, "--input", file, "--text-column", "body", "--prompt-column", "task"]
    result = cli(*common, *prompts)
    assert result.exit_code == 0, result.stderr
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ["topic", "sentiment"]
    file.write_text("body,task\nA fine film.,toppic\nA fine film.,topic\n")
    assert "row 1 names prompt 'toppic'; given with --prompt: sentiment, topic" in cli(*common, *prompts).stderr


def test_the_bare_base_generates_greedily_and_by_seed(cli, tiny_llama_package):
    def ask(*more):
        result = cli("run", tiny_llama_package, "Once upon", "--max-new-tokens", 8, *more)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert ask() == ask("--temperature", 0)
    assert ask("--temperature", 2, "--seed", 1) == ask("--temperature", 2, "--seed", 1)
    assert len({ask("--temperature", 5, "--seed", seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "txt"])
def test_output_file_appears_whole(suffix, cli, answers, tiny_llama_package, prompt_folder, tmp_path):
    out = tmp_path / f"answers.{suffix}"
    prompt = prompt_folder / "sentiment.safetensors"
    result = cli("run", tiny_llama_package, *TEXTS, "--prompt", prompt, "--output", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert os.listdir(tmp_path) == [out.name]
    labels = [answer.split("\t")[0] for answer in answers]
    with out.open(encoding="utf-8", newline="") as file:
        if suffix == "jsonl":
            assert [json.loads(line)["label"] for line in file] == labels
        elif suffix == "txt":
            assert file.read() == "".join(answers)
        else:
            rows = list(csv.DictReader(file, delimiter="," if suffix == "csv" else "\t"))
            assert [row["answer"] for row in rows] == labels
            assert [row["text"] for row in rows] == TEXTS


def test_a_failing_row_is_named_and_leaves_no_output(refused, tiny_llama_package, prompt_folder, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("fine\n" + "word " * 5000 + "\n")
    out = tmp_path / "answers.jsonl"
    prompt = prompt_folder / "sentiment.safetensors"
    line = refused("run", tiny_llama_package, "--prompt", prompt, "--input", file, "--output", out)
    assert line.startswith("row 2: ")
    assert "256" in line
    assert os.listdir(tmp_path) == ["texts.txt"]


def test_truncate_answers_a_text_that_is_too_long(cli, tiny_llama_package, prompt_folder):
    prompt = prompt_folder / "sentiment.safetensors"
    result = cli("run", tiny_llama_package, "word " * 5000, "--prompt", prompt, "--truncate")
    assert result.exit_code == 0, result.stderr


def test_a_prompt_inside_the_package_is_called_by_name(cli, refused, tiny_llama_base, prompt_folder, tmp_path):
    from exporters import export_model

    package = export_model(tiny_llama_base, tmp_path / "p", prompts=[prompt_folder / "topic.safetensors"]).path
    result = cli("run", package, "A fine film.", "--prompt", "topic")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split("\t")[0] in ("movie", "news")
    assert refused("run", package, "x", "--prompt", "other") == (
        "no prompt file 'other' and no prompt of that name (in the package: topic)"
    )


def test_refusals(refused, make_prompt, tiny_llama_package, prompt_folder, tmp_path):
    from edgeprompt.package.manifest import Base

    assert "no package folder" in refused("run", tmp_path / "none", "text")
    assert "is no package" in refused("run", tmp_path, "text")
    sentiment = prompt_folder / "sentiment.safetensors"
    assert "two prompts are called 'sentiment'" in refused(
        "run", tiny_llama_package, "text", "--prompt", sentiment, "--prompt", sentiment
    )
    other = tmp_path / "other.safetensors"
    save_prompt(make_prompt("other", base=Base("another-model", "sha256:00")), other)
    line = refused("run", tiny_llama_package, "text", "--prompt", other)
    assert "another-model" in line
    assert load_prompt(sentiment).base.brief in line
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(sentiment.read_bytes()[:100])
    assert "bad prompt file" in refused("run", tiny_llama_package, "text", "--prompt", broken)
    assert "stdin is empty" in refused("run", tiny_llama_package, stdin="")
    data = tmp_path / "data.csv"
    data.write_text("sentence\nhello\n")
    assert "has no column 'text'; it has: sentence" in refused("run", tiny_llama_package, "--input", data)
    data.write_bytes(b"text\n\xff\xfe\n")
    assert "is not UTF-8" in refused("run", tiny_llama_package, "--input", data)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "is empty" in refused("run", tiny_llama_package, "--input", empty)


def test_usage(cli, tiny_llama_package, tmp_path):
    assert "not both" in cli("run", tiny_llama_package, "text", "--input", "x.txt").stderr
    assert "--prompt-column needs --input" in cli("run", tiny_llama_package, "t", "--prompt-column", "p").stderr


def test_a_prompt_of_another_base_is_served_when_asked_for(cli, answers, make_prompt, tiny_llama_package, tmp_path):
    from edgeprompt.package.manifest import Base

    other = tmp_path / "other.safetensors"
    save_prompt(make_prompt("sentiment", base=Base("another-model", "sha256:00")), other)
    result = cli("run", tiny_llama_package, TEXTS[0], "--prompt", other, "--allow-base-mismatch")
    assert result.stdout == answers[0]


def test_a_prompt_for_other_weights_is_refused_where_the_package_is_far(
    cli, refused, make_prompt, tiny_llama_package, tmp_path
):
    from edgeprompt.prompts.file import TunedFor

    far, file = tmp_path / "far", tmp_path / "p.safetensors"
    shutil.copytree(tiny_llama_package, far)
    manifest = json.loads((far / "edgeprompt.json").read_text())
    (far / "edgeprompt.json").write_text(json.dumps({**manifest, "quality": {"kl_mean": 0.4, "perplexity_base": 9.0}}))
    save_prompt(make_prompt("p", tuned_for=TunedFor("int4", "sha256:00")), file)
    (tmp_path / "data.csv").write_text("text,label\na film,positive\n")
    for command in (("run", far, "a film", "--prompt", file), ("eval", far, tmp_path / "data.csv", "--prompt", file)):
        line = refused(*command)
        assert "tuned for int4" in line
        assert f"--for {far}" in line
        assert "note: prompt 'p' was tuned for int4" in cli(*command, "--allow-other-weights").stderr


def test_other_weights_than_tuned_for_are_noted(cli, make_prompt, tiny_llama_package, tmp_path):
    from edgeprompt.prompts.file import TunedFor

    file = tmp_path / "p.safetensors"
    for tuned, words in (
        (TunedFor("int4", "sha256:00"), "was tuned for int4, this package is fp32"),
        (TunedFor("fp32", "sha256:00"), "was tuned for another fp32 package"),
        (TunedFor("fp32"), ""),
    ):
        save_prompt(make_prompt("p", tuned_for=tuned), file)
        result = cli("run", tiny_llama_package, "text", "--prompt", file)
        assert result.exit_code == 0
        assert (words in result.stderr) if words else result.stderr == ""


def test_stop_text_ends_the_answer(cli, tiny_llama_package):

    def ask(*more):
        return json.loads(cli("run", tiny_llama_package, "Once upon", "--max-new-tokens", 12, "--json", *more).stdout)

    whole = ask()["text"]
    stop = whole[len(whole) // 2 :][:2]
    found = ask("--stop", stop.replace("\n", r"\n").replace("\t", r"\t"))
    assert found["finish_reason"] == "stop"
    assert found["text"] == whole[: whole.index(stop)]


def test_beams_are_searched_by_encoder_decoders_alone(cli, refused, seq2seq_package, tiny_llama_package):
    package = seq2seq_package("T5")
    with edgeprompt.load(package) as runtime:
        options = edgeprompt.GenerationOptions(max_new_tokens=5, num_beams=3)
        wanted = runtime.generate("So, so good", options=options).text
    result = cli("run", package, "So, so good", "--max-new-tokens", 5, "--num-beams", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == wanted + "\n"
    assert "num_beams" in refused("run", tiny_llama_package, "So, so good", "--num-beams", 3)


def test_every_option_of_a_session_reaches_the_engine():
    from edgeprompt.cli import serving

    for threads, workers in ((3, None), (None, 2)):  # a worker has one thread
        session = {"provider": "cpu", "threads": threads, "workers": workers, "cache": "x", "drafts": True}
        session["allow_other_weights"] = True
        assert session.keys() == serving.SessionOptions.__annotations__.keys()
        options = serving.engine_options(session)
        found = {name: getattr(options, "cache_folder" if name == "cache" else name) for name in session}
        assert found == session
