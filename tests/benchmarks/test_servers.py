from __future__ import annotations

import sys
from pathlib import Path

import edgeprompt
from benchmarks.peers.servers import REQUESTS, TASKS, ask, started, table
from tests.support.prompts import make_prompt


def test_every_client_of_a_served_package_is_answered(tiny_llama_package: Path, tmp_path: Path) -> None:
    manifest = edgeprompt.load(tiny_llama_package).manifest
    for task in range(TASKS):
        prompt = make_prompt(manifest, f"task{task}", seed=task)
        edgeprompt.save_prompt(prompt, tmp_path / f"task{task}.safetensors")
    command = [sys.executable, "-m", "edgeprompt", "serve", str(tiny_llama_package), "--prompts", str(tmp_path)]
    with started([*command, "--port", "0"], "edgeprompt") as server:
        found = ask(server, ["a plain text", "another"], "", clients=2)
    assert len(found["latencies"]) == 2 * REQUESTS
    assert found["tokens"] > 0
    assert max(found["latencies"]) <= found["seconds"]


def test_the_table_has_medians_of_rounds() -> None:
    rounds = [{"latencies": [0.1, 0.2, 0.3], "tokens": tokens, "seconds": 2.0} for tokens in (30, 20, 50)]
    machine = {"day": "2026-11-30", "cpu": "x", "isa": [], "cores": 2, "versions": {}}
    rows = {"edgeprompt": {"8": rounds, "resident_mb": 200}}
    assert "| edgeprompt | 8 | 200 | 298 | 15 (10 to 25) | 200 |" in table({"rows": rows, "machine": machine})
