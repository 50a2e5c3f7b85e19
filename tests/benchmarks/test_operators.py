"""The operators' profile, on a tiny decoder."""

from pathlib import Path

from benchmarks.ablations.operators import profile, to_markdown
from edgeprompt.package.folder import open_package


def test_prefill_and_decode_are_told_apart(tiny_llama_package: Path):
    package = open_package(tiny_llama_package)
    size = package.manifest.geometry
    found = profile(package.graph("model"), size, 1)
    assert set(found) == {"prefill", "decode"}
    for operators in found.values():
        _, calls = operators["GroupQueryAttention"]
        assert calls == size.num_layers
        assert list(operators.values()) == sorted(operators.values(), key=lambda one: -one[0])


def test_the_table_adds_operators_up_by_what_they_are_for():
    kinds = {
        "prefill": {"MatMulNBits": [3.0, 5], "MatMul": [1.0, 2]},
        "decode": {"MatMulNBits": [2.0, 5], "Concat": [0.5, 1], "MatMul": [0.25, 2], "Where": [0.1, 1]},
    }
    graphs = {"ours": {"milliseconds": {"prefill": [4.0], "decode": [2.0, 3.0, 4.0]}, "operators": kinds}}
    machine = {"day": "a day", "cpu": "a processor", "isa": ["AVX2"], "cores": 2, "versions": {"onnxruntime": "1"}}
    lines = to_markdown({"machine": machine, "threads": 2, "text": 32, "graphs": graphs}).splitlines()
    decode = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert decode == ["ours", "3.00 (2.00 to 4.00)", "9", "2.00", "0.00", "0.00", "0.00", "0.75", "0.10"]
    assert "2 threads" in lines[-1]
