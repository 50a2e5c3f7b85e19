"""Loading a base by its Hugging Face id, and what is refused before anything is loaded."""

import json
import struct
import subprocess
import sys
import time

import pytest

from edgeprompt.base.load import load_base
from edgeprompt.base.memory import Sizes, check_memory
from edgeprompt.errors import CapacityError, SourceError
from edgeprompt.ort.free_memory import free_memory
from exporters import export_model
from tests.support.damaged import bases


def hub_cache(home, folder_of):
    """A cache as `hf download org/tiny` leaves it."""
    repository = home / "hub/models--org--tiny"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    folder_of(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    return snapshot


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}])
def test_an_id_in_the_cache(tmp_path, options):
    hub_cache(tmp_path, lambda folder: bases.save(folder, **options))
    code = (
        "from edgeprompt.base.load import load_base\n"
        "base = load_base('org/tiny')\n"
        "print(base.name, base.tokenizer.encode('th'), base.fingerprint, base.model.generation_config.eos_token_id)"
    )
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    same = load_base(bases.save(tmp_path / "same"))
    assert done.stdout.split() == ["org/tiny", "[258]", same.fingerprint, "0"], done.stderr


def test_code_of_its_own_is_refused_at_once(tmp_path):
    path = bases.CASES["code of its own"].make(tmp_path)
    started = time.perf_counter()
    with pytest.raises(SourceError, match="runs no code"):
        load_base(path)
    assert time.perf_counter() - started < 5  # transformers would wait 15 seconds for an answer


def test_a_known_type_with_code_beside_it_is_taken_without_the_code(tmp_path):
    path = bases.config(auto_map={"AutoModelForCausalLM": "modeling.M"})(tmp_path)
    (path / "modeling.py").write_text("raise SystemExit('run')")
    assert load_base(path).config.model_type == "llama"


def test_a_base_that_memory_is_too_small_for_is_refused_before_it_is_read(tmp_path):
    """A file of 2 TB on disk that takes none: the table has 8 billion rows, all of them a hole in the file."""
    rows = 8 << 30
    path = bases.config(vocab_size=rows)(tmp_path)
    table = {"dtype": "F64", "shape": [rows, 32], "data_offsets": [0, rows * 32 * 8]}
    header = json.dumps({"model.embed_tokens.weight": table}).encode()
    with (path / bases.WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + rows * 32 * 8)
    for act in (load_base, lambda base: export_model(base, tmp_path / "out")):
        started = time.perf_counter()
        with pytest.raises(CapacityError, match=r"274\.88 billion .*needs about \d+\.\d GB .* GB are free"):
            act(path)
        assert time.perf_counter() - started < 20
    assert not (tmp_path / "out").exists()


def test_free_memory_is_a_sum_that_a_small_base_fits_into():
    free = free_memory()
    assert free is None or 1 << 20 < free < 1 << 50
    check_memory("small", Sizes(1000))
