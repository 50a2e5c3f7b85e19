"""Runs every command of docs/converting.md and compares what it prints; EDGEPROMPT_WRITE_DOCS=1 writes it instead."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

from edgeprompt.cli import main

ROOT = Path(__file__).resolve().parents[3]
DOC = ROOT / "docs/converting.md"
GOLDEN = ROOT / "tests/golden/foreign"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def peft(name: str, tensors: dict[str, tuple[int, ...]], **config: object) -> None:
    random = np.random.default_rng(0)
    Path(name).mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **config}
    Path(name, "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gpt2", **config}))
    made = {key: random.standard_normal(shape).astype(np.float32) for key, shape in tensors.items()}
    save_file(made, Path(name, "adapter_model.safetensors"))


@pytest.fixture
def specimens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the guide's commands run: tiny bases, and a file of every format."""
    monkeypatch.chdir(tmp_path)
    for base in ("gpt2", "bert", "t5"):
        shutil.copytree(GOLDEN / base, base)
    for case in ("openprompt-soft-gpt2", "openprompt-mixed-gpt2", "openprompt-prefix-t5"):
        shutil.copy(GOLDEN / case / "checkpoint.ckpt", f"{case}.ckpt")
    for case in ("p-tuning-v2-bert", "p-tuning-v2-tagging-bert"):
        shutil.copytree(GOLDEN / case, case)
    rows = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    width = {"prompt_embeddings": (4, 16)}
    peft("sentiment", width)
    peft("topics", {**width, "prefix_task_cols": (2, 4, 1), "prefix_task_rows": (2, 1, 16)},
         peft_type="MULTITASK_PROMPT_TUNING")  # fmt: skip
    peft("reviews", {**width, "base_model.score.weight": (2, 16)}, task_type="SEQ_CLS")
    peft("prefix", {"prompt_embeddings": (4, 64)}, peft_type="PREFIX_TUNING", num_layers=2, num_attention_heads=2)
    delta = {"base_model.model.transformer.wte.trainable_tokens_delta": (2, 16)}
    peft("marks", delta, peft_type="TRAINABLE_TOKENS", token_indices=[7, 9], target_modules=["wte"])
    peft("lora", {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (2, 16)}, peft_type="LORA")
    np.save("t5x.npy", rows[0] * 300)
    np.save("table.npy", np.where(np.arange(5)[None, :, None] < np.array([5, 3])[:, None, None], rows, 0))
    torch.save({"prompt_table": {"prompt_table.mood.prompt_embeddings.weight": torch.from_numpy(rows[0])}}, "nemo.ckpt")
    torch.save(torch.from_numpy(rows[:1]), "embeds.pt")
    Path("tgis").mkdir()
    torch.save(torch.from_numpy(rows[0]), "tgis/decoder.pt")
    np.save("nan.npy", rows[0] * np.nan)
    np.save("wide.npy", np.ones((4, 24), np.float32))
    Path("cut.pt").write_bytes(Path("embeds.pt").read_bytes()[:400])
    torch.save({"prompt": Fraction(1, 2)}, "code.pt")
    return tmp_path


def test_the_guide_prints_what_it_says(specimens: Path) -> None:
    text = DOC.read_text("utf-8")

    def run(block: re.Match[str]) -> str:
        commands = [line for line in block[1].splitlines() if line.startswith(("$ ", "    -"))]
        joined = "\n".join(commands).replace("\\\n", " ").splitlines()
        shown = []
        for command, lines in zip(joined, "\n".join(commands).replace("\\\n", "\\\0").splitlines(), strict=True):
            tool, *arguments = shlex.split(command.removeprefix("$ "))
            assert tool == "edgeprompt"
            shown += [*lines.replace("\0", "\n").splitlines(), CliRunner().invoke(main, arguments).output.rstrip("\n")]
        return "```console\n" + "\n".join(shown) + "\n```"

    found = BLOCK.sub(run, text)
    if os.environ.get("EDGEPROMPT_WRITE_DOCS"):
        DOC.write_text(found, encoding="utf-8")
    assert DOC.read_text("utf-8") == found
    assert len(BLOCK.findall(found)) > 10


def test_nothing_else_stands_on_the_terminal(tmp_path: Path) -> None:
    """In a process of its own: libraries that load a base have much to say."""
    command = ["-m", "edgeprompt", "convert", str(GOLDEN / "p-tuning-v2-bert"), "-o", str(tmp_path / "out.safetensors")]
    done = subprocess.run(
        [sys.executable, *command, "--base", str(GOLDEN / "bert")], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path / 'out.safetensors'}\n"
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {"found", "note"}
