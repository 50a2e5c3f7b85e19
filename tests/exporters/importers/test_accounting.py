"""Every tensor of a foreign file is used, known to be harmless, or refused; what is converted can be served."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edgeprompt import load_prompt
from edgeprompt.errors import EdgePromptError
from edgeprompt.package.fingerprint import parse
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Base
from exporters import convert_prompt
from exporters.importers.base_facts import read_base_facts
from exporters.importers.foreign import BaseFacts
from exporters.importers.openprompt_template import read_template
from tests.exporters.importers.test_configs import CASES as CONFIGS
from tests.exporters.importers.test_hostile import BASE, BERT, CASES, ROWS, T5, adapter, npy, saved
from tests.support.damaged import bases as bases_damaged

GOLDEN = Path(__file__).resolve().parents[2] / "golden/foreign"
BERT16 = BaseFacts(BERT.base, "encoder-only", "bert", BERT.geometry.__class__(27, 16, 2, 2, 2, 8))


def renamed(case: str, home: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A golden checkpoint whose state is changed."""
    shutil.copytree(GOLDEN / case, home / case)
    file = next(path for path in (home / case).iterdir() if path.suffix in (".ckpt", ".bin"))
    torch.save(change(torch.load(file, weights_only=True)), file)
    return file if file.suffix == ".ckpt" else file.parent


def under(prefix: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


WRAPPINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "module.": under("module."),
    "_orig_mod.": under("_orig_mod."),
    "both": under("module._orig_mod."),
    "base_model.model.": under("base_model.model."),
    "Lightning": lambda state: {
        "state_dict": under("model.")(state),
        "optimizer_states": [{"state": {0: torch.ones(2)}}],
    },
    "OpenPrompt's trainer": lambda state: {
        "state_dict": state,
        "optimizer": [{"state": {0: {"m": torch.ones(2)}}}],
        "epoch": 1,
    },
    "a plain loop": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
}


WRAPPED = ("p-tuning-v2-bert", "p-tuning-v2-qa-bert", "openprompt-soft-gpt2")


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_change_nothing(case: str, wrapping: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """`module.` in front of a P-Tuning v2 checkpoint lost its trained head in silence."""
    base = BERT16 if case.endswith("bert") else BASE
    convert_prompt(
        GOLDEN / case / "checkpoint.ckpt" if base is BASE else GOLDEN / case,
        tmp_path / "a.safetensors",
        base=base,
        name="x",
    )
    convert_prompt(renamed(case, tmp_path, WRAPPINGS[wrapping]), tmp_path / "b.safetensors", base=base, name="x")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(names)}


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def more(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, name: torch.ones(2, 2)}


DAMAGED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "v2: no head": ("p-tuning-v2-bert", without("classifier."), "holds no head"),
    "v2: renamed head": ("p-tuning-v2-bert", rename("classifier.", "head.classifier."), "also holds head.classifier"),
    "v2: no bias": ("p-tuning-v2-bert", without("classifier.bias"), "classifier.bias"),
    "v2: half a pooler": ("p-tuning-v2-bert", without("bert.pooler.dense.bias"), "pooler"),
    "v2: LoRA inside": ("p-tuning-v2-bert", more("bert.encoder.layer.0.attention.lora_A.weight"), "also holds"),
    "v2: an adapter beside": ("p-tuning-v2-bert", more("adapter.down.weight"), "also holds adapter.down.weight"),
    "v2: no projection": ("p-tuning-v2-projected-bert", without("prefix_encoder.trans"), "prefix_projection"),
    "v2: two encoders": ("p-tuning-v2-bert", more("other.prefix_encoder.embedding.weight"), "two prefix encoders"),
    "v2: other weights beside": ("p-tuning-v2-bert", lambda s: {"model": s, "ema": {"w": torch.ones(2)}}, "also holds"),
    "openprompt: no mask of words": ("openprompt-soft-gpt2", without("verbalizer.words_ids_mask"), "words_ids_mask"),
    "openprompt: two templates": (
        "openprompt-soft-gpt2", more("prompt_model.template.decoder_wte.weight"), "different templates",
    ),
    "openprompt: LoRA in the model": ("openprompt-soft-gpt2", more("prompt_model.plm.h.0.lora_A.weight"), "also holds"),
    "openprompt: another verbalizer": ("openprompt-soft-gpt2", more("verbalizer.proto"), "also holds verbalizer.proto"),
    "openprompt: one name renamed": (
        "openprompt-soft-gpt2", rename("verbalizer.label_words_ids", "verbal.label_words_ids"), "also holds verbal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_no_tensor_is_left_out_in_silence(case: str, tmp_path: Path) -> None:
    golden, change, says = DAMAGED[case]
    source = renamed(golden, tmp_path, change)
    with pytest.raises(EdgePromptError, match=says) as caught:
        convert_prompt(source, tmp_path / "out.safetensors", base=BERT16 if golden.endswith("bert") else BASE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def with_head(**more: Any) -> dict[str, Any]:
    head = {"base_model.classifier.weight": ROWS[:3].copy(), "base_model.classifier.bias": ROWS[0, :3].copy()}
    return {"prompt_embeddings": ROWS, **head, **more}


SEQ_CLS = {"task_type": "SEQ_CLS"}
DEEP = {"peft_type": "PREFIX_TUNING", "num_layers": 3, "num_attention_heads": 2, "token_dim": 8}
FLAT = {"prompt_embeddings": np.ones((4, 48), np.float32)}
MULTI = {
    "prompt_embeddings": ROWS,
    "prefix_task_cols": np.ones((2, 4, 1), np.float32),
    "prefix_task_rows": np.ones((2, 1, 16), np.float32),
}
ADAPTERS: dict[str, tuple[BaseFacts, dict[str, Any], dict[str, Any], str]] = {
    "token_dim": (BASE, {"token_dim": 8}, {"prompt_embeddings": ROWS}, "token_dim 8"),
    "layers of another base": (BASE, {"num_layers": 7}, {"prompt_embeddings": ROWS}, "num_layers 7"),
    "heads of another base": (BASE, {"num_attention_heads": 3}, {"prompt_embeddings": ROWS}, "num_attention_heads 3"),
    "prefix: token_dim": (BASE, {**DEEP, "token_dim": 16}, FLAT, "token_dim 16"),
    "prefix: layers": (BASE, {**DEEP, "num_layers": 6, "token_dim": 4}, FLAT, "6 layers"),
    "prefix: heads": (BASE, {**DEEP, "num_attention_heads": 4}, FLAT, "4 key-value heads"),
    "multitask: tasks": (BASE, {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 3}, MULTI, "num_tasks 3"),
    "factors without multitask": (BASE, {}, MULTI, "prefix_task_cols"),
    "a pooler": (BERT, SEQ_CLS, with_head(**{"base_model.bert.pooler.dense.weight": ROWS}), "pooler"),
    "no bias": (BERT, SEQ_CLS, {"prompt_embeddings": ROWS, "base_model.classifier.weight": ROWS[:3].copy()}, "bias"),
    "head of another name": (BERT, SEQ_CLS, {"prompt_embeddings": ROWS, "base_model.cls.weight": ROWS}, "classifier"),
    "unknown method": (BASE, {"peft_type": "SOFT_THING"}, {"prompt_embeddings": ROWS}, "no method of PEFT"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_contradict_themselves(case: str, tmp_path: Path) -> None:
    base, config, tensors, says = ADAPTERS[case]
    with pytest.raises(EdgePromptError, match=says):
        convert_prompt(adapter(tmp_path / "a", config, tensors), tmp_path / "out.safetensors", base=base, task_index=0)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.base_model.model."])
def test_wrapped_adapters(prefix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}{name}": tensor for name, tensor in with_head().items()}
    convert_prompt(adapter(tmp_path / "a", SEQ_CLS, tensors), tmp_path / "out.safetensors", base=BERT)
    assert set(load_prompt(tmp_path / "out.safetensors").head) == {"classifier.weight", "classifier.bias"}


BARE: dict[str, Callable[[Path], Path]] = {
    "t5x": lambda d: npy(d / "x.npy", ROWS),
    "trtllm": lambda d: npy(d / "x.npy", ROWS[None]),
    "vllm": lambda d: saved(d / "x.pt", torch.from_numpy(ROWS)),
    "nemo": lambda d: saved(d / "x.ckpt", {"a.inference_table": torch.from_numpy(ROWS)}),
    "tgis": lambda d: saved(d / "decoder.pt", torch.from_numpy(ROWS)),
    "peft": lambda d: adapter(d / "a"),
}


@pytest.mark.parametrize("kind", BARE)
def test_a_bare_prompt_on_an_encoder_says_what_is_needed(kind: str, tmp_path: Path) -> None:
    """It was written with the task "generate", which no encoder serves."""
    source, out = BARE[kind](tmp_path), tmp_path / "out.safetensors"
    words = {"bad": ["bad"], "good": ["good"]}
    for options, says in (
        ({}, "generates nothing"),
        ({"verbalizer": words}, "0 {mask}"),
        ({"verbalizer": {"bad": ["bad"]}, "template": "{prompt}{text}{mask}"}, "two labels"),
    ):
        with pytest.raises(EdgePromptError, match=says):
            convert_prompt(source, out, base=BERT, **options)
        assert not out.exists()
    convert_prompt(source, out, base=BERT, verbalizer=words, template="{prompt}{text} It was {mask}.")
    assert load_prompt(out).task == "classify"
    if kind != "tgis":  # its decoder.pt is for decoders
        convert_prompt(source, tmp_path / "t5.safetensors", base=T5)
    convert_prompt(source, tmp_path / "decoder.safetensors", base=BASE)
    with pytest.raises(EdgePromptError, match="leave it out"):
        convert_prompt(source, tmp_path / "m.safetensors", base=BASE, template="{prompt}{text}{mask}")


@pytest.mark.parametrize("name", ["x.bin", "x.npy", "x.safetensors", "x.ckpt"])
def test_git_lfs_pointers(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(EdgePromptError, match="git lfs pull"):
        convert_prompt(tmp_path / name, tmp_path / "out.safetensors", base=BASE)


def test_compressed_archives(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pt", torch.zeros(400, 16))
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in archive.namelist():
            bomb.writestr(part, archive.read(part))
    with pytest.raises(EdgePromptError, match="compressed archive"):
        convert_prompt(tmp_path / "bomb.pt", tmp_path / "out.safetensors", base=BASE)


def test_one_soft_token_in_several_places() -> None:
    """OpenPrompt's "same": one row, as often as "duplicate" says."""
    found = read_template(
        '{"soft": None, "duplicate": 3, "same": True} {"placeholder":"text_a"} {"soft"} {"mask"}', BERT
    )
    assert found is not None
    assert found.soft_ids == (1, 1, 1, 2)


def test_the_source_is_looked_at_before_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.convert.read_base_facts", lambda base: pytest.fail("the base was loaded"))
    for make, says in (
        (lambda d: d / "none", "nothing is at"),
        (lambda d: adapter(d / "a", {"peft_type": "LORA"}), "merge_and_unload"),
        (lambda d: adapter(d / "b", {"token_dim": 8}), "token_dim"),
    ):
        with pytest.raises(EdgePromptError, match=says):
            convert_prompt(make(tmp_path), tmp_path / "out.safetensors", base=GOLDEN / "gpt2")


@pytest.mark.parametrize("template", ["{prompt:2}{text}", "{prompt:9}{text}", "{prompt:2}{text}{prompt:1}"])
def test_a_template_that_places_another_number_of_tokens_is_refused(template: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, 16), np.float32))
    with pytest.raises(EdgePromptError, match="virtual tokens, and the prompt has 4"):
        convert_prompt(tmp_path / "x.npy", tmp_path / "out.safetensors", base=BASE, template=template)
    assert not (tmp_path / "out.safetensors").exists()


def test_folders_inside_are_named(tmp_path: Path) -> None:
    adapter(tmp_path / "checkpoint-500")
    with pytest.raises(EdgePromptError, match=r"its folders do: .*checkpoint-500"):
        convert_prompt(tmp_path, tmp_path.with_name("out.safetensors"), base=BASE)


@pytest.mark.parametrize("base", ["gpt2", "t5"])
def test_embeddings_that_peft_saved(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Accepted where they are the base's own, tied or not; else refused, whatever they are called."""
    weights = load_file(bases[base] / "model.safetensors")
    name = "transformer.wte.weight" if base == "gpt2" else "shared.weight"
    own = weights[name]
    rows = np.ones((4, own.shape[1]), np.float32)
    task = {"task_type": "CAUSAL_LM" if base == "gpt2" else "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}
    saved_names = [f"base_model.{name}"] if base == "t5" else [f"base_model.{name}", "base_model.lm_head.weight"]
    source = adapter(tmp_path / "a", task, {"prompt_embeddings": rows, **{one: own.copy() for one in saved_names}})
    convert_prompt(source, tmp_path / "out.safetensors", base=bases[base])
    np.testing.assert_array_equal(load_prompt(tmp_path / "out.safetensors").prompt_embeddings, rows)
    for other, says in ((own * 2, "other values"), (own[:-1].copy(), "base .* has \\[")):
        save_file({"prompt_embeddings": rows, saved_names[0]: other}, source / "adapter_model.safetensors")
        with pytest.raises(EdgePromptError, match=says):
            convert_prompt(source, tmp_path / "no.safetensors", base=bases[base])


def words_of(ids: list[Any], masks: list[Any]) -> Callable[[dict[str, Any]], Any]:
    used = torch.tensor(masks)
    there = {"words_ids_mask": used, "label_words_mask": used[..., 0]}
    return lambda state: {
        **state,
        **{f"verbalizer.{name}": value for name, value in {"label_words_ids": torch.tensor(ids), **there}.items()},
    }


@pytest.mark.parametrize("case", ["openprompt-soft-gpt2", "openprompt-soft-bert", "openprompt-soft-t5"])
def test_label_words_that_no_checkpoint_explains(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Several tokens a word: `multi_token_handler` is in no checkpoint. One word twice: a mean with weights."""
    base = read_base_facts(bases[case.rpartition("-")[2]])
    good, bad = (
        int(torch.load(GOLDEN / case / "checkpoint.ckpt", weights_only=True)["verbalizer.label_words_ids"][at])
        for at in (0, 1)
    )
    template = json.loads((GOLDEN / case / "expected.json").read_text("utf-8"))["template"]
    several = words_of([[[good, bad]], [[bad, good]]], [[[1, 1]], [[1, 0]]])
    source = renamed(case, tmp_path / "a", several)
    with pytest.raises(EdgePromptError, match=r"several tokens.*--verbalizer"):
        convert_prompt(source, tmp_path / "no.safetensors", base=base, template=template)
    words = {"x": [base.tokenizer.decode([good])], "y": [base.tokenizer.decode([bad])]}
    convert_prompt(source, tmp_path / "out.safetensors", base=base, template=template, verbalizer=words)
    found = load_prompt(tmp_path / "out.safetensors")
    assert list(found.verbalizer) == ["x", "y"]
    assert found.verbalizer_aggregation == "sum"  # of one word each, which is all the same
    assert found.generation.get("decoder_prefix") == ("<extra_id_0>" if case.endswith("t5") else None)
    twice = words_of([[[good], [good], [bad]], [[good + 1], [0], [0]]], [[[1], [1], [1]], [[1], [0], [0]]])
    with pytest.raises(EdgePromptError, match="more often than others"):
        convert_prompt(renamed(case, tmp_path / "b", twice), tmp_path / "no.safetensors", base=base, template=template)
    assert not (tmp_path / "no.safetensors").exists()


def test_trainable_tokens_of_two_layers(tmp_path: Path) -> None:
    """PEFT writes the rows of a tied output layer again; rows that differ are another training."""
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 7, 9, 12], "target_modules": ["embed_tokens"]}
    names = [f"base_model.model.{layer}.trainable_tokens_delta" for layer in ("model.embed_tokens", "lm_head")]
    same = adapter(tmp_path / "a", config, {names[0]: ROWS, names[1]: ROWS.copy()})
    report = convert_prompt(same, tmp_path / "out.safetensors", base=BASE)
    np.testing.assert_array_equal(load_prompt(tmp_path / "out.safetensors").prompt_embeddings, ROWS)
    assert any("lm_head" in line for line in report.dropped)
    for other in (ROWS * 2, ROWS[:3].copy(), np.where(np.arange(16) == 5, 1.001, ROWS).astype(np.float32)):
        with pytest.raises(EdgePromptError, match="lm_head"):
            convert_prompt(
                adapter(tmp_path / "b", config, {names[0]: ROWS, names[1]: other}),
                tmp_path / "no.safetensors",
                base=BASE,
            )
        assert not (tmp_path / "no.safetensors").exists()


FROZEN = {
    "openprompt-soft-gpt2": "prompt_model.plm.transformer.h.1.mlp.c_fc.bias",
    "openprompt-soft-bert": "prompt_model.plm.bert.encoder.layer.0.attention.self.query.weight",
    "openprompt-prefix-t5": "prompt_model.plm.decoder.block.1.layer.0.SelfAttention.q.weight",
    "openprompt-mixed-gpt2": "prompt_model.template.raw_embedding.weight",
    "p-tuning-v2-bert": "bert.encoder.layer.1.output.dense.weight",
    "p-tuning-v2-roberta": "roberta.encoder.layer.1.output.dense.weight",
    "p-tuning-v2-qa-bert": "bert.embeddings.LayerNorm.weight",
}


def nudged(*ends: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {name: tensor + 1e-4 if name.endswith(ends) else tensor for name, tensor in state.items()}


@pytest.mark.parametrize("case", FROZEN)
def test_a_base_that_was_trained_too(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """OpenPrompt's default is `freeze_plm=False`: such a prompt was converted in silence, for another base."""
    base = read_base_facts(bases[case.rpartition("-")[2]])
    half: Callable[[dict[str, Any]], Any] = lambda state: {  # noqa: E731
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    template = json.loads((GOLDEN / case / "expected.json").read_text("utf-8")).get("template")
    source = renamed(case, tmp_path / "half", half)
    convert_prompt(source, tmp_path / "half.safetensors", base=base, template=template)
    for wrapping in ("module.", "Lightning"):
        source = renamed(case, tmp_path / wrapping, lambda state: WRAPPINGS[wrapping](nudged(FROZEN[case])(state)))  # noqa: B023
        with pytest.raises(EdgePromptError, match="trained together with the prompt") as caught:
            convert_prompt(source, tmp_path / "no.safetensors", base=base, template=template)
        assert FROZEN[case] in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("case", FROZEN)
def test_a_trained_base_against_a_package(case: str, package: Callable[[str], Path], tmp_path: Path) -> None:
    """A package's fingerprint covers every parameter; the copy used to be compared by its embedding alone."""
    base = package(case.rpartition("-")[2])
    template = json.loads((GOLDEN / case / "expected.json").read_text("utf-8")).get("template")
    whole = renamed(case, tmp_path / "a", dict)
    report = convert_prompt(whole, tmp_path / "out.safetensors", base=base, template=template)
    assert not any("was compared" in line for line in report.notes)
    ends = ("wte.weight", "word_embeddings.weight", "shared.weight", "raw_embedding.weight", "embed_tokens.weight")
    trained = FROZEN[case]
    for change in (ends, (trained,)):
        flipped: Callable[[dict[str, Any]], Any] = lambda state: {  # noqa: E731
            name: -tensor if name.endswith(change) else tensor  # noqa: B023
            for name, tensor in state.items()
        }
        with pytest.raises(EdgePromptError, match="trained together"):
            source = renamed(case, tmp_path / f"b{len(change)}", flipped)
            convert_prompt(source, tmp_path / "no.safetensors", base=base, template=template)
        assert not (tmp_path / "no.safetensors").exists()


def test_a_package_of_an_older_format_says_that_it_tells_less(package: Callable[[str], Path], tmp_path: Path) -> None:
    case = "openprompt-soft-gpt2"
    folder = shutil.copytree(package("gpt2"), tmp_path / "package")
    manifest = open_package(folder).manifest
    old = Base(manifest.base.name, f"sha256:{parse(manifest.base.fingerprint).first}" + "0" * 48)
    replace(manifest, base=old).write(folder)
    report = convert_prompt(renamed(case, tmp_path / "a", dict), tmp_path / "out.safetensors", base=folder)
    assert any("which is of an older format" in line for line in report.notes)


def test_the_counts_in_the_docs() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/robustness.md").read_text("utf-8").split("## Damaged files")[1]
    text = text.split("\n## ")[0]
    counts = [
        int(line.split("|")[2])
        for line in text.splitlines()
        if line.startswith("|") and line.split("|")[2].strip().isdigit()
    ]
    assert counts == [len(cases) for cases in (bases_damaged.CASES, CASES, DAMAGED, ADAPTERS, CONFIGS, FROZEN)]
    assert f"{sum(case.loads for case in bases_damaged.CASES.values())} of the cases load with a note" in text
    assert f"{len(WRAPPINGS)} wrappings of {len(WRAPPED)} checkpoints" in " ".join(text.split())


def test_the_counts_of_streams_and_files_in_the_docs() -> None:
    from tests.base import test_sentencepiece_file as pieces
    from tests.engines.seq2seq import test_budget_states as budget
    from tests.package import test_outputs as outputs

    text = (Path(__file__).resolve().parents[3] / "docs/robustness.md").read_text("utf-8")
    assert 120 + len(pieces.WHITE) + len(pieces.WRITTEN) > 130
    for line in (
        f"| {len(pieces.BASES)} kinds of tokenizer, over 130 texts each |",
        f"| {len(outputs.OURS)} kinds that a command wrote before, {len(outputs.FOREIGN)} that could be anybody's, and "
        f"{len(outputs.OTHERS)} of another kind |",
        f"| T5 and BART, {budget.RUNS} runs of up to {budget.STEPS} steps:",
    ):
        assert line in text, line


@pytest.mark.parametrize(("weight", "bias"), [((16, 2), 2), ((2, 15), 2), ((2, 16), 3)])
def test_a_head_whose_tensors_do_not_fit_is_refused_at_conversion(
    tmp_path: Path, weight: tuple[int, int], bias: int
) -> None:
    assert (BERT.geometry.hidden_size, BERT.geometry.num_layers) == (16, 3)
    state = {
        "prefix_encoder.embedding.weight": torch.randn(4, 3 * 2 * 16),
        "classifier.weight": torch.randn(*weight),
        "classifier.bias": torch.randn(bias),
    }
    torch.save(state, tmp_path / "p.bin")
    with pytest.raises(EdgePromptError, match="head"):
        convert_prompt(tmp_path / "p.bin", tmp_path / "out.safetensors", base=BERT)
    assert not (tmp_path / "out.safetensors").exists()
