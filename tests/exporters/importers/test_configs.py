"""Configs of NeMo, OpenPrompt and P-Tuning v2 that contradict the tensors beside them, or the base."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprompt.errors import BaseMismatchError, MissingDependencyError, SourceError
from edgeprompt.package.manifest import Base, Geometry
from exporters import convert_prompt
from exporters.importers.configs import read_yaml
from exporters.importers.foreign import BaseFacts
from tests.exporters.importers.test_hostile import adapter

BASE = BaseFacts(Base("tiny", "sha256:1"), "decoder-only", "llama", Geometry(60, 16, 3, 4, 2, 4))
BERT = BaseFacts(Base("tiny", "sha256:1"), "encoder-only", "bert", Geometry(60, 16, 3, 4, 4, 4))
T5 = BaseFacts(Base("tiny", "sha256:1"), "encoder-decoder", "t5", Geometry(60, 16, 3, 4, 4, 4, 0, 2))
Yaml = dict[str, Any]


def nemo(folder: Path, config: Yaml | bytes, *, tasks: tuple[str, ...] = ("a",), inside: bool = True) -> Path:
    """Tables of 4 x 16, in an archive or beside their config."""
    state = {f"prompt_table.prompt_table.{task}.prompt_embeddings.weight": torch.ones(4, 16) for task in tasks}
    state = state or {"inference_table": torch.ones(4, 16)}
    written = config if isinstance(config, bytes) else json.dumps(config).encode()  # YAML takes JSON
    data = io.BytesIO()
    torch.save(state, data)
    files = {"model_config.yaml": written, "model_weights.ckpt": data.getvalue()}
    if not inside:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder / "model_weights.ckpt"
    with tarfile.open(folder / "x.nemo", "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / "x.nemo"


def task(name: str = "a", **more: Any) -> Yaml:
    return {"task_templates": [{"taskname": name, "prompt_template": "<|VIRTUAL_PROMPT_0|> {text}", **more}]}


def openprompt(folder: Path, config: Yaml, state: dict[str, Any], *, inside: bool = False) -> Path:
    """A checkpoint in the folder `checkpoints` of a run, whose config is one folder above."""
    place = folder if inside else folder / "checkpoints"
    place.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    torch.save({"state_dict": {f"prompt_model.template.{n}": t for n, t in state.items()}}, place / "best.ckpt")
    return place / "best.ckpt"


SOFT = {"soft_embeds": torch.ones(4, 16)}
WIDTH = 3 * 2 * 2 * 4
PREFIX = {
    "decoder_wte.weight": torch.ones(4, 16),
    "decoder_control_trans.0.weight": torch.ones(6, 16),
    "decoder_control_trans.0.bias": torch.ones(6),
    "decoder_control_trans.2.weight": torch.ones(WIDTH, 6),
    "decoder_control_trans.2.bias": torch.ones(WIDTH),
}
MLP = {
    "new_embedding.weight": torch.ones(4, 16),
    **{f"new_mlp_head.{n}.weight": torch.ones(16, 16) for n in (0, 2)},
    **{f"new_mlp_head.{n}.bias": torch.ones(16) for n in (0, 2)},
}
PTUNING_CONFIG = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "model_type": "bert"}


def v2(folder: Path, *, projected: bool = False, **config: Any) -> Path:
    state = {"bert.prefix_encoder.embedding.weight": torch.ones(4, 3 * 2 * 16)}
    if projected:
        sizes = {"embedding.weight": (4, 16), "trans.0.weight": (6, 16), "trans.2.weight": (96, 6)}
        sizes |= {"trans.0.bias": (6,), "trans.2.bias": (96,)}
        state = {f"bert.prefix_encoder.{name}": torch.ones(size) for name, size in sizes.items()}
    torch.save(state, folder / "pytorch_model.bin")
    said = {"pre_seq_len": 4, "prefix_projection": projected, **PTUNING_CONFIG, **config}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


Case = tuple[Callable[[Path], Path], BaseFacts, str]
CASES: dict[str, Case] = {
    "nemo: number of tokens": (
        lambda d: nemo(d, task(total_virtual_tokens=10)),
        BASE,
        "total_virtual_tokens of task 'a' 10, its tensors 4",
    ),
    "nemo: splits": (lambda d: nemo(d, task(virtual_token_splits=[3, 3])), BASE, "that make 6, its tensors 4"),
    "nemo: hidden size": (lambda d: nemo(d, {"hidden_size": 32, **task()}), BASE, "hidden_size 32, its tensors 16"),
    "nemo: the frozen model's hidden size": (
        lambda d: nemo(d, {"frozen_model": {"hidden_size": 32}}),
        BASE,
        "hidden_size 32, its tensors 16",
    ),
    "nemo: layers": (
        lambda d: nemo(d, {"hidden_size": 16, "num_layers": 12}),
        BASE,
        "num_layers 12; base tiny has 3",
    ),
    "nemo: heads": (
        lambda d: nemo(d, {"hidden_size": 16, "num_attention_heads": 8}),
        BASE,
        "num_attention_heads 8; base tiny has 4",
    ),
    "nemo: a task without a table": (
        lambda d: nemo(d, {"existing_tasks": ["a"], "new_tasks": ["b"]}),
        BASE,
        "names task 'b', and the tables are of a",
    ),
    "nemo: a table of another task": (lambda d: nemo(d, task("b")), BASE, "templates for b, and a table is of task"),
    "nemo: of two tasks one": (
        lambda d: nemo(
            d,
            {"task_templates": [*task(total_virtual_tokens=4)["task_templates"],
                                *task("b", total_virtual_tokens=5)["task_templates"]]},
            tasks=("a", "b"),
        ),
        BASE,
        "total_virtual_tokens of task 'b' 5, its tensors 4",
    ),
    "nemo: one table without a name": (
        lambda d: nemo(d, task(total_virtual_tokens=10), tasks=()),
        BASE,
        "10, its tensors 4",
    ),
    "nemo: unpacked": (
        lambda d: nemo(d, task(total_virtual_tokens=10), inside=False),
        BASE,
        "10, its tensors 4",
    ),
    "nemo: no YAML": (lambda d: nemo(d, b"a: [1\nb: 2"), BASE, "is no YAML of plain values"),
    "nemo: YAML with code": (
        lambda d: nemo(d, b"!!python/object/apply:os.system ['touch was-run']"),
        BASE,
        "is no YAML of plain values",
    ),
    "nemo: a list": (lambda d: nemo(d, b"[1, 2]"), BASE, "must hold names and values"),
    "openprompt: soft tokens": (
        lambda d: openprompt(d, {"template": "soft_template", "soft_template": {"num_tokens": 20}}, SOFT),
        BASE,
        "num_tokens 20, its tensors 4",
    ),
    "openprompt: config beside the checkpoint": (
        lambda d: openprompt(d, {"template": "soft_template", "soft_template": {"num_tokens": 20}}, SOFT, inside=True),
        BASE,
        "num_tokens 20, its tensors 4",
    ),
    "openprompt: prefix tokens": (
        lambda d: openprompt(d, {"template": "prefix_template", "prefix_template": {"num_token": 5}}, PREFIX),
        BASE,
        "num_token 5, its tensors 4",
    ),
    "openprompt: prefix width": (
        lambda d: openprompt(d, {"template": "prefix_template", "prefix_template": {"mid_dim": 512}}, PREFIX),
        BASE,
        "mid_dim 512, its tensors 6",
    ),
    "openprompt: prefix of another side": (
        lambda d: openprompt(
            d,
            {"template": "prefix_template", "prefix_template": {"using_decoder_past_key_values": False}},
            PREFIX,
        ),
        BASE,
        "using_decoder_past_key_values false",
    ),
    "openprompt: encoder": (
        lambda d: openprompt(
            d, {"template": "ptuning_template", "ptuning_template": {"prompt_encoder_type": "lstm"}}, MLP
        ),
        BASE,
        "prompt_encoder_type 'lstm'",
    ),
    "openprompt: another template": (
        lambda d: openprompt(d, {"template": "mixed_template"}, SOFT),
        BASE,
        "says template 'mixed_template', and the checkpoint has soft_embeds",
    ),
    "openprompt: another base": (
        lambda d: openprompt(d, {"template": "soft_template", "plm": {"model_name": "gpt2"}}, SOFT),
        BASE,
        "plm.model_name 'gpt2'; base tiny is 'llama'",
    ),
    "p-tuning v2: layers and width": (
        lambda d: v2(d, hidden_size=8, num_hidden_layers=6),
        BERT,
        "hidden_size 8; base tiny has 16",
    ),
    "p-tuning v2: layers": (lambda d: v2(d, num_hidden_layers=6), BERT, "num_hidden_layers 6; base tiny has 3"),
    "p-tuning v2: heads": (lambda d: v2(d, num_attention_heads=2), BERT, "num_attention_heads 2; base tiny has 4"),
    "p-tuning v2: another base": (lambda d: v2(d, model_type="roberta"), BERT, "model_type 'roberta'; base tiny is"),
    "p-tuning v2: width of the projection": (
        lambda d: v2(d, projected=True, prefix_hidden_size=512),
        BERT,
        "prefix_hidden_size 512, its tensors 6",
    ),
}  # fmt: skip


def test_an_adapter_for_another_number_of_layers_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    for layers, fits in ((3, True), (2, True), (6, False)):
        folder = tmp_path / str(layers)
        config = {"num_layers": layers, "token_dim": 16, "task_type": "SEQ_2_SEQ_LM", "num_attention_heads": 4}
        source = adapter(folder, config)
        if fits:
            convert_prompt(source, tmp_path / f"{layers}.safetensors", base=T5)
            continue
        with pytest.raises(BaseMismatchError, match="num_layers 6; base tiny has 3"):
            convert_prompt(source, tmp_path / f"{layers}.safetensors", base=T5)


@pytest.mark.parametrize("case", CASES)
def test_a_config_that_contradicts_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, base, says = CASES[case]
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    with pytest.raises((SourceError, BaseMismatchError)) as caught:
        convert_prompt(source, tmp_path / "out.safetensors", base=base)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_configs_that_agree_are_taken(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_layers": 3, "num_attention_heads": 4, "new_tasks": ["a"], "frozen_model": None}
    good = {
        "nemo": (lambda d: nemo(d, {**sizes, **task(total_virtual_tokens=4, virtual_token_splits=[1, 3])}), BASE),
        "bare": (lambda d: nemo(d, {**task("any", total_virtual_tokens=4)}, tasks=()), BASE),
        "soft": (
            lambda d: openprompt(d, {"template": "soft_template", "soft_template": {"num_tokens": 4}}, SOFT),
            BASE,
        ),
        "prefix": (
            lambda d: openprompt(
                d, {"template": "prefix_tuning_template", "prefix_template": {"num_token": 4, "mid_dim": 6}}, PREFIX
            ),
            BASE,
        ),
        "other tool": (lambda d: openprompt(d, {"model": "x", "num_tokens": 7}, SOFT), BASE),
        "v2": (lambda d: v2(d), BERT),
        "v2 projected": (lambda d: v2(d, projected=True, prefix_hidden_size=6), BERT),
    }
    for name, (make, base) in good.items():
        (tmp_path / name).mkdir()
        words = {"template": "{text} is {mask}", "verbalizer": {"a": ["x"], "b": ["y"]}} if base is BERT else {}
        report = convert_prompt(make(tmp_path / name), tmp_path / f"{name}.safetensors", base=base, **words)
        assert len(report.prompts) == 1
        if name == "nemo":
            assert any("'<|VIRTUAL_PROMPT_0|> {text}', which says where" in one for one in report.dropped)


def test_without_pyyaml_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependencyError, match=r"config.yaml is a YAML file: pip install 'edgeprompt\[export\]'"):
        read_yaml(b"a: 1", "config.yaml")
