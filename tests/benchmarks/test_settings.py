"""Session settings side by side, on a tiny decoder."""

from pathlib import Path

from benchmarks.ablations.settings import PLAIN, measure, settings, to_markdown


def test_every_setting_has_its_turns(tiny_llama_package: Path):
    found = measure(tiny_llama_package, 2, turns=3)
    assert list(found) == list(settings(2))
    assert {len(times) for kinds in found.values() for times in kinds.values()} == {3}


def test_one_thread_has_no_other_to_tie():
    assert set(settings(2)) - set(settings(1)) == {"threads tied to cores"}


def test_the_table_compares_within_turns():
    plain = {"decode": [2.0, 4.0, 8.0], "prefill": [10.0, 10.0, 10.0]}
    slow = {"decode": [4.0, 8.0, 16.0], "prefill": [5.0, 5.0, 5.0]}
    machine = {"day": "a day", "cpu": "a processor", "isa": ["AVX2"], "cores": 2, "versions": {"onnxruntime": "1"}}
    facts = {"machine": machine, "threads": 2, "text": 32, "milliseconds": {"int4": {PLAIN: plain, "slow": slow}}}
    lines = to_markdown(facts).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [PLAIN, "4.00 ms", "10.00 ms"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "slow",
        "2.00 (2.00 to 2.00)",
        "0.50 (0.50 to 0.50)",
    ]
