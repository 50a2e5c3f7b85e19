"""The getting-started page, command by command, on a tiny base."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_getting_started(cli, tiny_llama_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = (ROOT / "docs" / "getting-started.md").read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]
    said = {}
    assert lines.pop(0) == "pip install '.[cpu,tune,export,eval,serve,hub]'"
    serve, curl = lines[-2:]
    lines = lines[:-2]
    assert serve.startswith("edgeprompt serve")  # run in tests/server
    assert curl.startswith("curl")
    header, *rows = re.search(r"```csv\n(.*?)```", page, re.DOTALL)[1].splitlines()
    for name in ("tickets.csv", "tickets.test.csv"):
        (tmp_path / name).write_text("\n".join([header, *rows * 8]) + "\n", "utf-8")
    for line in lines:
        program, command, *args = shlex.split(line)
        if program == "python":  # it prints where the base of the package lies
            shown = subprocess.run([sys.executable, command, *args], check=True, stdout=subprocess.PIPE, text=True)
            assert Path(shown.stdout.strip()).is_file()
            continue
        assert program == "edgeprompt"
        args = [str(tiny_llama_base) if arg == BASE else arg for arg in args]
        short = ["--steps", "2"] if command == "tune" else ["--limit", "10"] if command == "eval" else []
        result = cli(command, *args, *short)
        assert result.exit_code == 0, f"{line}: {result.stderr}"
        said.setdefault(command, []).append(result.stdout)
    assert "tickets: accuracy" in said["eval"][1]
    shown = cli("run", "model", "--prompt", "prompts/tickets.safetensors", "Where is my parcel?").stdout
    assert shown.split("\t")[0] in ("billing", "delivery", "defect")
    assert list(said) == ["export", "run", "inspect", "tune", "eval"]
    assert said["run"][1].split("\t")[0] in ("negative", "positive")
    assert len((tmp_path / "answers.csv").read_text("utf-8").splitlines()) == 121
    assert [line.split(":")[0] for line in said["eval"][0].splitlines() if "n = 10" in line] == [
        "sentiment",
        "zero-shot",
    ]

    from edgeprompt import load_prompt
    from edgeprompt.package.folder import open_package

    tuned = load_prompt("sentiment.safetensors").tuned_for
    assert tuned.weights_hash == open_package("model").manifest.weights_hash
    assert (
        "sentiment"
        in json.loads(
            cli("validate", "model", "--against", tiny_llama_base, "--prompt", "sentiment.safetensors", "--json").stdout
        )["prompts"]
    )
