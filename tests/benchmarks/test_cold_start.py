"""The table of a cold start, from known seconds."""

from benchmarks.ablations.cold_start import ALONE, STAGES, to_markdown


def test_medians_of_stages_and_the_whole():
    starts = [[0.01 * number] * len(STAGES) + [0.05, 0.06] for number in (1, 2, 3)]
    machine = {"day": "a day", "cpu": "a processor", "isa": ["AVX2"], "cores": 2, "versions": {"onnxruntime": "1"}}
    lines = to_markdown({"machine": machine, "stages": STAGES + ALONE, "seconds": {"int4": starts}}).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[: 1 + len(STAGES)] == ["int4", *["20"] * len(STAGES)]
    assert cells[1 + len(STAGES)].startswith("140 (")
    assert cells[2 + len(STAGES) :] == ["50", "60"]
