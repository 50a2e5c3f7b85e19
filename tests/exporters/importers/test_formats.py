"""Small foreign formats, the ways out, and round trips."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from edgeprompt import load_prompt
from edgeprompt.cli import convert as cli
from edgeprompt.errors import InputError, SourceError, UnsupportedError
from edgeprompt.package.manifest import Base, Geometry
from exporters import convert_prompt
from exporters.convert import TARGETS
from exporters.importers import FORMATS, detect_format
from exporters.importers.foreign import BaseFacts

HIDDEN = 16


def facts(architecture: str = "decoder-only", model_type: str = "llama", layers: int = 3) -> BaseFacts:
    encoder = layers if architecture == "encoder-decoder" else 0
    return BaseFacts(
        Base("tiny", "sha256:1"), architecture, model_type, Geometry(60, HIDDEN, layers, 4, 2, 4, 0, encoder)
    )


def rows(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, HIDDEN)).astype(np.float32)


def write_peft(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    written = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_formats_of_the_command_line_are_those_of_the_library() -> None:
    assert set(cli.FORMATS) == {"auto", *FORMATS}
    assert cli.TARGETS == TARGETS


def test_t5x(tmp_path: Path) -> None:
    table = rows(5) * 1000
    np.save(tmp_path / "prompt.npy", table)
    report = convert_prompt(tmp_path / "prompt.npy", tmp_path / "out.safetensors", base=facts())
    prompt = load_prompt(tmp_path / "out.safetensors")
    assert report.source_format == "t5x"
    assert (prompt.name, prompt.method, str(prompt.template)) == ("prompt", "prompt-tuning", "{prompt}{text}")
    np.testing.assert_array_equal(prompt.prompt_embeddings, table)
    assert prompt.prompt_embeddings is not None
    assert prompt.prompt_embeddings.dtype == np.float32


def test_trtllm_table_in_and_out(tmp_path: Path) -> None:
    for index, count in enumerate((5, 2)):
        np.save(tmp_path / f"task{index}.npy", rows(count, index))
        convert_prompt(tmp_path / f"task{index}.npy", tmp_path / f"task{index}.safetensors", base=facts())
    files = [tmp_path / "task0.safetensors", tmp_path / "task1.safetensors"]
    convert_prompt(files, tmp_path / "table.npy", target="trtllm")
    table = np.load(tmp_path / "table.npy")
    assert table.shape == (2, 5, HIDDEN)
    assert not table[1, 2:].any()
    report = convert_prompt(tmp_path / "table.npy", tmp_path / "tasks", base=facts())
    assert (report.source_format, report.prompts) == ("trtllm", ("table-0", "table-1"))
    assert "task 1: 3 zero rows of padding" in report.dropped
    np.testing.assert_array_equal(load_prompt(tmp_path / "tasks/table-1.safetensors").prompt_embeddings, rows(2, 1))
    convert_prompt(tmp_path / "table.npy", tmp_path / "one.safetensors", base=facts(), task_index=0)
    np.testing.assert_array_equal(load_prompt(tmp_path / "one.safetensors").prompt_embeddings, rows(5, 0))
    with pytest.raises(InputError, match="holds 2 prompts"):
        convert_prompt(tmp_path / "table.npy", tmp_path / "both.safetensors", base=facts())


@pytest.mark.parametrize("archive", [True, False])
def test_nemo(archive: bool, tmp_path: Path) -> None:
    state = {
        "prompt_table": {
            "prompt_table.mood.prompt_embeddings.weight": torch.from_numpy(rows(4)),
            "prompt_table.../../evil.prompt_embeddings.weight": torch.from_numpy(rows(3)),
        }
    }
    checkpoint = tmp_path / "model_weights.ckpt"
    torch.save(state, checkpoint)
    source = checkpoint
    if archive:
        source = tmp_path / "tasks.nemo"
        with tarfile.open(source, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("../../escape.txt"), io.BytesIO())
            tar.add(checkpoint, "./model_weights.ckpt")
    report = convert_prompt(source, tmp_path / "mood.safetensors", base=facts(), task_index="mood")
    assert report.source_format == "nemo"
    np.testing.assert_array_equal(load_prompt(tmp_path / "mood.safetensors").prompt_embeddings, rows(4))


def test_nemo_flat_table_and_prompt_encoder(tmp_path: Path) -> None:
    key = "model.embedding.adapter_layer.ptuning_adapter.inference_table"
    torch.save({key: torch.from_numpy(rows(4)).bfloat16()}, tmp_path / "flat.ckpt")
    convert_prompt(tmp_path / "flat.ckpt", tmp_path / "flat.safetensors", base=facts())
    assert load_prompt(tmp_path / "flat.safetensors").num_virtual_tokens == 4
    torch.save({"prompt_encoder.mlp_head.0.weight": torch.zeros(2, 2)}, tmp_path / "encoder.ckpt")
    with pytest.raises(UnsupportedError, match="inference table"):
        convert_prompt(tmp_path / "encoder.ckpt", tmp_path / "no.safetensors", base=facts())


def test_vllm(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(rows(4))[None].half(), tmp_path / "embeds.pt")
    report = convert_prompt(tmp_path / "embeds.pt", tmp_path / "out.safetensors", base=facts())
    prompt = load_prompt(tmp_path / "out.safetensors")
    assert report.source_format == "vllm"
    np.testing.assert_array_equal(prompt.prompt_embeddings, rows(4).astype(np.float16))


def test_tgis(tmp_path: Path) -> None:
    folder = tmp_path / "my-prefix"
    folder.mkdir()
    torch.save(torch.from_numpy(rows(4)), folder / "decoder.pt")
    report = convert_prompt(folder, tmp_path / "out.safetensors", base=facts())
    assert (report.source_format, report.prompts) == ("tgis", ("my-prefix",))
    with pytest.raises(SourceError, match=r"needs encoder\.pt"):
        convert_prompt(folder, tmp_path / "no.safetensors", base=facts("encoder-decoder", "t5"))
    torch.save(torch.from_numpy(rows(4)), folder / "encoder.pt")
    with pytest.raises(UnsupportedError, match="decoder's input"):
        convert_prompt(folder, tmp_path / "no.safetensors", base=facts("encoder-decoder", "t5"))


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_peft_weights_and_detection(weights: str, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "adapter", {"prompt_embeddings": rows(4)})
    if weights.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
        torch.save({"prompt_embeddings": torch.from_numpy(rows(4))}, folder / weights)
    assert detect_format(folder) == detect_format(folder / weights) == "peft"
    convert_prompt(folder, tmp_path / "out.safetensors", base=facts())
    np.testing.assert_array_equal(load_prompt(tmp_path / "out.safetensors").prompt_embeddings, rows(4))


PREFIX = {"num_layers": 3, "num_attention_heads": 2, "token_dim": 8}
ROUND_TRIPS = {
    "prompt": (facts(), {"prompt_embeddings": rows(4)}, {}),
    "half": (facts(), {"prompt_embeddings": rows(4).astype(np.float16)}, {}),
    "p-tuning": (facts(), {"prompt_embeddings": rows(4)}, {"peft_type": "P_TUNING"}),
    "prefix": (
        facts(),
        {"prompt_embeddings": np.random.default_rng(1).standard_normal((4, 48)).astype(np.float32)},
        {"peft_type": "PREFIX_TUNING", **PREFIX},
    ),
    "prefix of a T5, odd layers": (
        facts("encoder-decoder", "t5"),
        {"prompt_embeddings": np.random.default_rng(1).standard_normal((4, 48)).astype(np.float32)},
        {"peft_type": "PREFIX_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2, **PREFIX},
    ),
    "head": (
        facts("encoder-only", "roberta"),
        {
            "prompt_embeddings": rows(4),
            "base_model.classifier.dense.weight": rows(16, 1),
            "base_model.classifier.dense.bias": rows(1, 2)[0],
            "base_model.classifier.out_proj.weight": rows(3, 3),
            "base_model.classifier.out_proj.bias": rows(1, 4)[0, :3].copy(),
        },
        {"task_type": "SEQ_CLS"},
    ),
}


def test_what_peft_never_reads_is_dropped(tmp_path: Path) -> None:
    t5 = facts("encoder-decoder", "t5", layers=4)
    flat = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    config = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}
    deep = {**config, **PREFIX, "num_layers": 4, "peft_type": "PREFIX_TUNING"}
    report = convert_prompt(
        write_peft(tmp_path / "deep", {"prompt_embeddings": flat}, **deep), tmp_path / "deep.safetensors", base=t5
    )
    assert report.dropped == ("layers 1, 3 of the prefix: PEFT reads layer 2i modulo 4 for decoder layer i",)
    prompt = write_peft(tmp_path / "rows", {"prompt_embeddings": rows(8)}, **config)
    report = convert_prompt(prompt, tmp_path / "rows.safetensors", base=t5)
    assert "prompt_embeddings[4:8]" in report.dropped[0]
    assert load_prompt(tmp_path / "rows.safetensors").num_virtual_tokens == 4


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_peft_round_trip_gives_the_same_bytes(case: str, tmp_path: Path) -> None:
    base, tensors, config = ROUND_TRIPS[case]
    adapter = write_peft(tmp_path / "adapter", tensors, **config)
    convert_prompt(adapter, tmp_path / "prompt.safetensors", base=base)
    convert_prompt(tmp_path / "prompt.safetensors", tmp_path / "back", target="peft", base=base)
    back = load_file(tmp_path / "back/adapter_model.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def test_back_to_a_peft_that_loads_and_computes_the_same(bases: dict[str, Path], package: Any, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ):
        home = tmp_path / config.peft_type
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases["gpt2"]), config)
        model.save_pretrained(home / "adapter")
        convert_prompt(home / "adapter", home / "prompt.safetensors", base=package("gpt2"))
        convert_prompt(home / "prompt.safetensors", home / "back", target="peft")
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["gpt2"]), home / "back")
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            want, got = (
                one.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for one in (model, again)
            )
        assert torch.equal(want, got)


@pytest.mark.parametrize("case", ["p-tuning-v2-bert", "p-tuning-v2-roberta"])
def test_a_head_that_peft_cannot_load(case: str, golden: Path, package: Any, tmp_path: Path) -> None:
    """P-Tuning v2 pools otherwise than transformers does."""
    base = package(case.rpartition("-")[2])
    convert_prompt(golden / case, tmp_path / "prompt.safetensors", base=base)
    with pytest.raises(SourceError, match="give --base"):
        convert_prompt(tmp_path / "prompt.safetensors", tmp_path / "back", target="peft")
    with pytest.raises(UnsupportedError, match="PEFT loads no other"):
        convert_prompt(tmp_path / "prompt.safetensors", tmp_path / "back", target="peft", base=base)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("case", ["p-tuning-v2-tagging-bert", "p-tuning-v2-qa-bert"])
def test_p_tuning_v2_to_a_peft_that_computes_the_same(case: str, golden: Path, package: Any, tmp_path: Path) -> None:
    import peft
    import transformers

    convert_prompt(golden / case, tmp_path / "back", target="peft", base=package("bert"))
    auto, options = (
        (transformers.AutoModelForQuestionAnswering, {})
        if "qa" in case
        else (transformers.AutoModelForTokenClassification, {"num_labels": 3})
    )
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(golden / "bert", **options), tmp_path / "back").eval()
    expected = json.loads((golden / case / "expected.json").read_text("utf-8"))
    for ids, want in zip(expected["input_ids"], expected["logits"], strict=True):
        text = torch.tensor([ids])
        with torch.no_grad():
            out = model(input_ids=text, attention_mask=torch.ones_like(text))
        got = torch.stack([out.start_logits[0], out.end_logits[0]], -1) if "qa" in case else out.logits[0]
        assert (got - torch.tensor(want)).abs().max() < 1e-5


def test_chatglm_names(tmp_path: Path) -> None:
    """ChatGLM's checkpoints of P-Tuning v2: keys and values of few heads, one encoder for all layers."""
    flat = np.random.default_rng(0).standard_normal((4, 3 * 2 * 2 * 4)).astype(np.float32)
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.from_numpy(flat)}, tmp_path / "pytorch_model.bin")
    report = convert_prompt(tmp_path, tmp_path / "out.safetensors", base=facts())
    assert report.source_format == "p-tuning-v2"
    prefix = load_prompt(tmp_path / "out.safetensors").past_key_values
    assert prefix is not None
    np.testing.assert_array_equal(prefix[1, 1, 0, 2], flat[2].reshape(3, 2, 2, 4)[1, 1, 0])


def test_onnx_adapter_holds_the_graphs_inputs(tmp_path: Path) -> None:
    import onnxruntime as ort

    adapter = write_peft(tmp_path / "adapter", {"prompt_embeddings": rows(4)})
    convert_prompt(adapter, tmp_path / "out.onnx_adapter")
    found = ort.AdapterFormat.read_adapter(str(tmp_path / "out.onnx_adapter")).get_parameters()
    np.testing.assert_array_equal(found["prompt_embeddings"].numpy(), rows(4))
    prefix = write_peft(tmp_path / "prefix", *ROUND_TRIPS["prefix"][1:2], peft_type="PREFIX_TUNING", **PREFIX)
    convert_prompt(prefix, tmp_path / "prefix.onnx_adapter")
    found = ort.AdapterFormat.read_adapter(str(tmp_path / "prefix.onnx_adapter")).get_parameters()
    assert set(found) == {f"past_key_values.{layer}.{part}" for layer in range(3) for part in ("key", "value")}
    assert list(found["past_key_values.2.value"].shape()) == [1, 2, 4, 4]


def test_command_line(tmp_path: Path) -> None:
    from edgeprompt.cli import main

    adapter = write_peft(tmp_path / "adapter", {"prompt_embeddings": rows(4)})
    target = tmp_path / "table.npy"
    done = CliRunner().invoke(main, ["convert", str(adapter), "-o", str(target), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["source_format"] == "peft"
    np.testing.assert_array_equal(np.load(target), rows(4))
    failed = CliRunner().invoke(main, ["convert", str(adapter), "-o", str(tmp_path / "out.safetensors")])
    assert failed.exit_code == 1
    assert "give --base" in failed.output
