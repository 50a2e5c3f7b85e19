"""Several processes, as `torchrun` and `accelerate launch` start them: the same training as in one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeprompt import load_prompt


@pytest.mark.timeout(300)
def test_two_processes_train_the_same_prompt(tiny_llama_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([[f"the film is {word} " * (1 + n % 3), word] for n in range(12) for word in ("good", "bad")])
    options = ["--steps", "7", "--batch-size", "5", "--virtual-tokens", "4", "--init", "random"]
    launchers = {
        "one": ["-m"],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"],
    }
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    told = {}
    for name, launcher in launchers.items():
        files = ["-o", tmp_path / f"{name}.safetensors", "--log", tmp_path / name]
        command = [sys.executable, *launcher, "edgeprompt", "tune", tiny_llama_base, data, *files, *options]
        done = subprocess.run(
            [*command, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()  # one process tells
        told[name] = json.loads(line)
    one, two = (load_prompt(tmp_path / f"{name}.safetensors") for name in launchers)
    assert one.prompt_embeddings is not None
    assert two.prompt_embeddings is not None
    assert np.allclose(one.prompt_embeddings, two.prompt_embeddings, atol=1e-4)
    assert told["one"]["eval_accuracy"] == told["two"]["eval_accuracy"]
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        for name in launchers
    ]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(losses[0]) == 7
