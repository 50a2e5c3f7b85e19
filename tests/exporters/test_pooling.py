"""What sentence-transformers notes beside a base: its pooling is kept, and what `embed` does without is told."""

import json

import pytest

from edgeprompt.errors import SourceError
from exporters.pooling import read_pooling

STEP = "sentence_transformers.models."


def write(folder, steps=(), pooling=None, place="1_Pooling", **files):
    folder.mkdir(exist_ok=True)
    if steps:
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": STEP + kind} for i, (kind, path) in enumerate(steps)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / place).mkdir()
        (folder / place / "config.json").write_text(json.dumps(pooling))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def modes(*names):
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {
        "word_embedding_dimension": 8,
        **{f"pooling_mode_{name}": name in names for name in known},
        "include_prompt": True,
    }


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        (None, "mean"),
        (modes("mean_tokens"), "mean"),
        (modes("cls_token"), "cls"),
        (modes("lasttoken"), "last"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
    ],
)
def test_a_pooling_of_ours_is_kept(noted, expected, tmp_path):
    assert read_pooling(write(tmp_path, pooling=noted)) == (expected, [])


@pytest.mark.parametrize("noted", [modes("max_tokens"), modes("cls_token", "mean_tokens"), {"pooling_mode": "max"}])
def test_another_pooling_is_told(noted, tmp_path):
    pooling, (note,) = read_pooling(write(tmp_path, pooling=noted))
    assert pooling == "mean"
    assert note.startswith("pooling ")


def test_what_comes_behind_or_in_front_is_told(tmp_path):
    steps = [("Transformer", ""), ("Pooling", "1_Pool"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    settings = {"prompts": {"query": "query: ", "other": ""}, "default_prompt_name": "query"}
    lower = {"max_seq_length": 8, "do_lower_case": True}
    files = {"sentence_bert_config": lower, "config_sentence_transformers": settings}
    pooling, notes = read_pooling(write(tmp_path, steps, modes("cls_token"), "1_Pool", **files))
    assert pooling == "cls"
    assert [note.split()[0] for note in notes] == ["a", "texts", "'query:"]
    assert "'Dense'" in notes[0]


def test_the_base_of_an_older_folder_has_its_pooling_beside_it(tmp_path):
    steps = [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")]
    write(tmp_path, steps, modes("cls_token"))
    base = tmp_path / "0_Transformer"
    base.mkdir()
    assert read_pooling(base) == ("cls", [])
    other = tmp_path / "other"
    other.mkdir()
    assert read_pooling(other) == ("mean", [])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"type": "x"}]', "[" * 5000])
def test_a_list_of_modules_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "modules.json").write_text(text)
    if text == "{}":
        assert read_pooling(tmp_path) == ("mean", [])
        return
    with pytest.raises(SourceError, match="is no list of modules"):
        read_pooling(tmp_path)


def test_export_tells(minilm_folder, tmp_path, caplog):
    """A pooling by the maximum was taken as the mean without a word."""
    import shutil

    from exporters import export_model

    base = tmp_path / "base"
    shutil.copytree(minilm_folder, base)
    shutil.rmtree(base / "1_Pooling")
    write(base, pooling=modes("max_tokens"))
    export_model(base, tmp_path / "package", precision="fp32")
    assert "pooling max_tokens (the mean is taken)" in caplog.text
