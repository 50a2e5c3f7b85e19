"""The encoder engine on MiniLM: embeddings, mixed batches, int8, prompts that come and go."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import Classification, Request
from tests.support.encoder_prompts import add_all, mixed_requests, with_head
from tests.support.runtimes import QUIET


@pytest.fixture
def texts(snippets: list[tuple[str, str]]) -> list[str]:
    return [text for text, _ in snippets[:42]]


def bare(result: Any) -> Any:
    """A result without its times."""
    return dataclasses.replace(result, timings=None) if isinstance(result, Classification) else result


def test_embeddings_are_those_of_transformers(
    minilm: edgeprompt.Runtime, minilm_folder: Path, texts: list[str]
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm_folder), AutoModel.from_pretrained(minilm_folder).eval()
    for text, got in zip(texts[:5], minilm.embed(texts[:5]), strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        np.testing.assert_allclose(got, states.mean(0), atol=2e-5)
        np.testing.assert_allclose(minilm.embed([text], pooling="cls")[0], states[0], atol=2e-5)
        np.testing.assert_allclose(minilm.embed([text], pooling="last")[0], states[-1], atol=2e-5)


def test_every_row_of_a_mixed_batch_equals_the_row_alone(minilm: edgeprompt.Runtime, texts: list[str]) -> None:
    requests = mixed_requests(texts)
    for request, got in zip(requests, minilm.run(requests), strict=True):
        want = minilm.run([request])[0]
        if isinstance(want, np.ndarray):
            np.testing.assert_allclose(got, want, atol=1e-5)
        elif isinstance(want, Classification):
            assert got.label == want.label
            np.testing.assert_allclose(list(got.logits.values()), list(want.logits.values()), atol=1e-4)
        elif hasattr(want, "words"):
            assert [(span.label, span.text) for span in got.words] == [(span.label, span.text) for span in want.words]
        else:
            assert got.text == want.text


def test_int8_rows_do_not_depend_on_what_their_neighbours_hold(minilm_int8_package: Path, texts: list[str]) -> None:
    """Activations are quantised row by row: an outlier in another row changes nothing, not even the last bit."""
    with edgeprompt.load(minilm_int8_package, options=QUIET) as runtime:
        add_all(runtime)
        calm = with_head(runtime, "calm", 2, count=4)
        assert calm.prompt_embeddings is not None
        runtime.add_prompt(calm)
        runtime.add_prompt(dataclasses.replace(calm, name="loud", prompt_embeddings=calm.prompt_embeddings * 100))
        for text in texts[:6]:
            alone, *beside = (
                runtime.run([Request(text, "five"), Request(text, name)])[0] for name in ("five", "calm", "loud")
            )
            assert bare(beside[0]) == bare(beside[1])
            assert beside[0].scores == pytest.approx(alone.scores, abs=0.02)


def test_int8_stays_close_and_small(
    minilm: edgeprompt.Runtime, minilm_package: Path, minilm_int8_package: Path, texts: list[str]
) -> None:
    exact = minilm.embed(texts)
    with edgeprompt.load(minilm_int8_package, options=QUIET) as runtime:
        close = runtime.embed(texts)
    cosines = (exact * close).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(close, axis=1)
    assert cosines.min() > 0.985
    sizes = [sum(file.stat().st_size for file in path.rglob("*")) for path in (minilm_package, minilm_int8_package)]
    assert sizes[1] < 0.35 * sizes[0]


def test_given_ids_answer_as_their_text_does(minilm: edgeprompt.Runtime) -> None:
    ids = minilm._package.tokenizer.encode("a fine film")
    for name in ("two", "deep"):
        by_ids = minilm.classify(input_ids=ids, prompt=name)
        assert by_ids.logits == pytest.approx(minilm.classify("a fine film", prompt=name).logits, abs=1e-5)


def test_long_and_odd_texts(minilm: edgeprompt.Runtime) -> None:
    for text in ("", "   ", "\x00", "🙂" * 3, "a" * 5000):
        assert isinstance(minilm.classify(text, prompt="two"), Classification)
    assert isinstance(minilm.run([Request("word " * 20_000, "deep", truncate=True)])[0], Classification)
    cut = minilm.run([Request("word " * 600, "tag", truncate=True)])[0]
    assert 400 < len(cut.words) < 512


def test_prompts_come_and_go_while_threads_run(minilm: edgeprompt.Runtime, texts: list[str]) -> None:
    want = minilm.classify(texts[0], prompt="two").logits
    failures: list[BaseException] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                assert minilm.classify(texts[0], prompt="two").logits == pytest.approx(want, abs=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for index in range(30):
        minilm.add_prompt(with_head(minilm, f"guest {index}", 2, seed=index))
        minilm.classify(texts[1], prompt=f"guest {index}")
        minilm.remove_prompt(f"guest {index}")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
