"""The npm package answers as the Python runtime: labels, scores, tokens, seeded texts, vectors, errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EdgePromptError
from edgeprompt.prompts.file import Head, HeadStep, PromptFile, save_prompt
from edgeprompt.prompts.template import Template
from tests.support.encoder_prompts import with_head
from tests.support.packages import package_before_the_check
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "examples/prompts"
TEXTS = ("The plot is thin, the cast is not.", "a", "Ünïcode ☃ and 東京 😀!", "one two three four five six seven eight")
CLOSE = 1e-6
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
_NAMES = {"max_new_tokens": "maxNewTokens", "top_p": "topP", "top_k": "topK", "min_p": "minP",
          "repetition_penalty": "repetitionPenalty"}  # fmt: skip


def _js(settings: dict[str, Any]) -> dict[str, Any]:
    return {_NAMES.get(name, name): value for name, value in settings.items()}


class Both:
    """The same package and prompts in both runtimes."""

    def __init__(self, ask: Callable[..., Any], package: Path, prompts: Sequence[Path], **options: Any) -> None:
        self.python = edgeprompt.load(package, options=QUIET)
        self._ask, self._package, self._options = ask, package, options
        self._prompts = prompts
        for prompt in prompts:
            self.python.add_prompt(prompt)

    def calls(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        """What the npm package answers to `calls`."""
        added = [{"prompt": str(prompt)} for prompt in self._prompts]
        found = self._ask("serve", package=str(self._package), options=self._options, calls=[*added, *calls])
        for one in found[: len(added)]:
            assert "error" not in one, one
        return found[len(added) :]

    def call(self, method: str, *args: Any) -> Any:
        """One answer."""
        (found,) = self.calls([{"method": method, "args": list(args)}])
        assert "error" not in found, found
        return found["value"]


def _same_classes(expected: Sequence[Any], found: Sequence[Any], close: float = CLOSE) -> None:
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        if one.scores:  # a regression's label is its value, rounded
            assert one.label == other["label"]
        assert list(one.labels) == other["labels"]
        for name in ("logits", "scores"):
            values = getattr(one, name)
            assert list(values) == list(other[name])
            assert all(abs(value - other[name][key]) <= close * max(1, abs(value)) for key, value in values.items())


def _save(folder: Path, *prompts: PromptFile) -> list[Path]:
    for prompt in prompts:
        save_prompt(prompt, folder / f"{prompt.name}.safetensors")
    return [folder / f"{prompt.name}.safetensors" for prompt in prompts]


def _head(manifest: Any, name: str, task: str, source: str, labels: Sequence[str], **fields: Any) -> PromptFile:
    rng, width = np.random.default_rng(5), manifest.geometry.hidden_size
    tensors = {
        "dense.weight": rng.normal(0, 0.2, (width, width)).astype(np.float32),
        "dense.bias": rng.normal(0, 0.2, width).astype(np.float32),
        "norm.weight": rng.normal(1, 0.1, width).astype(np.float16),
        "out.weight": rng.normal(0, 1, (len(labels), width)).astype(np.float32),
    }
    steps = [HeadStep("linear", "dense"), HeadStep("gelu"), HeadStep("layer_norm", "norm"), HeadStep("linear", "out")]
    spec = Head(source, tuple(steps), fields.pop("problem_type", "single_label"))
    named = () if task == "qa" else tuple(labels)
    return make_prompt(manifest, name, task=task, head=tensors, head_spec=spec, labels=named, **fields)


MANY = {
    f"{verb} {thing}": (f" {verb} the {thing}",)
    for verb in ("cancel", "find", "cut", "open", "take", "make")
    for thing in ("card", "can", "account", "film", "plot", "book", "story")
}
"""Words of several tokens, many of which begin alike: more than one step takes side by side."""


def _tiny_prompts(manifest: Any, folder: Path) -> list[Path]:
    long = {"x": (" good", " very good indeed"), "y": (" bad", " badly made"), "z": (" so so",)}
    return _save(
        folder,
        make_prompt(manifest, "words", verbalizer=WORDS),
        make_prompt(manifest, "long", verbalizer=long, calibration=(0.1, -0.2, 0.3)),
        make_prompt(manifest, "many", verbalizer=MANY),
        make_prompt(manifest, "mean", verbalizer=long, verbalizer_aggregation="mean"),
        make_prompt(manifest, "best", verbalizer=long, verbalizer_aggregation="max"),
        make_prompt(manifest, "deep", "prefix-tuning", verbalizer=long, template=Template.parse("{text}\nA:")),
        make_prompt(manifest, "inside", verbalizer=WORDS, template=Template.parse("{text} {prompt:2}is{prompt}")),
        make_prompt(manifest, "story", seed=1),
    )


@pytest.fixture
def tiny(ask: Callable[..., Any], tiny_llama_package: Path, tmp_path: Path) -> Both:
    manifest = edgeprompt.load(tiny_llama_package, options=QUIET).manifest
    return Both(ask, tiny_llama_package, _tiny_prompts(manifest, tmp_path))


@pytest.mark.parametrize("worker", [False, True])
def test_decoder_classifies(tiny: Both, worker: bool) -> None:
    tiny._options["worker"] = worker
    names = [name for name in tiny.python.prompts if name != "story"]
    answers = tiny.calls([{"method": "classify", "args": [TEXTS, {"prompt": name}]} for name in names])
    for name, found in zip(names, answers, strict=True):
        _same_classes(tiny.python.classify(list(TEXTS), prompt=name), found["value"])


def test_a_small_budget_scores_fewer_words_at_once(tiny: Both) -> None:
    size = tiny.python.manifest.geometry
    tiny._options["kvBudget"] = 8 * size.num_layers * size.num_key_value_heads * size.head_size * 100
    _same_classes(tiny.python.classify(list(TEXTS), prompt="many"), tiny.call("classify", TEXTS, {"prompt": "many"}))
    tiny._options["kvBudget"] //= 25
    (found,) = tiny.calls([{"method": "classify", "args": [TEXTS[0], {"prompt": "words"}]}])
    assert found["error"] == "CapacityError"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**SAMPLED, "seed": 7},
        {"temperature": 0.7, "seed": 2**53 - 1},
        {"temperature": 2.0, "min_p": 0.05, "seed": 0},
        {"temperature": 1.5, "top_p": 0.5, "seed": 123456789012},
        {"repetition_penalty": 1.7},
        {"stop": ["e", " t"], "logprobs": True},
        {"choices": [" yes", " yesterday", " no"]},
    ],
    ids=str,
)
def test_decoder_generates(tiny: Both, settings: dict[str, Any]) -> None:
    settings = {"max_new_tokens": 12, **settings}
    for prompt in ("story", None):
        expected = [tiny.python.generate(text, prompt=prompt, **settings) for text in TEXTS]
        found = tiny.call("generate", TEXTS, {"prompt": prompt, **_js(settings)})
        for one, other in zip(expected, found, strict=True):
            assert list(one.token_ids) == other["tokenIds"]
            assert (one.text, one.finish_reason) == (other["text"], other["finishReason"])
            assert np.allclose(one.logprobs, other["logprobs"], atol=CLOSE)


def test_decoder_streams_logits_and_embeddings(tiny: Both) -> None:
    asked = {"prompt": "story", "max_new_tokens": 10}
    assert tiny.call("stream", TEXTS[0], _js(asked)) == list(tiny.python.stream(TEXTS[0], **asked))
    for prompt in ("story", "inside", "deep", None):
        expected = tiny.python.logits(TEXTS[2], prompt=prompt)
        assert np.abs(expected - np.array(tiny.call("logits", TEXTS[2], {"prompt": prompt}))).max() <= CLOSE
    expected = tiny.python.embed(list(TEXTS), prompt="story")
    assert np.abs(expected - np.array(tiny.call("embed", TEXTS, {"prompt": "story"}))).max() <= CLOSE * 10
    assert np.allclose(tiny.python.calibration("long"), tiny.call("calibration", "long"), atol=CLOSE)


def test_an_empty_text_reads_the_prompt_alone(tiny: Both) -> None:
    expected = tiny.python.generate("", prompt="story", max_new_tokens=5)
    assert tiny.call("generate", "", {"prompt": "story", "maxNewTokens": 5})["tokenIds"] == list(expected.token_ids)


def test_mixed_tasks_in_one_call(tiny: Both) -> None:
    requests = [{"text": TEXTS[0], "prompt": name} for name in ("words", "story", "long")]
    requests.append({"text": TEXTS[0], "prompt": "nobody"})
    found = tiny.call("run", requests, {"returnErrors": True})
    assert found[0]["label"] == tiny.python.classify(TEXTS[0], prompt="words").label
    assert found[1]["tokenIds"] == list(tiny.python.generate(TEXTS[0], prompt="story").token_ids)
    assert found[2]["label"] == tiny.python.classify(TEXTS[0], prompt="long").label
    assert found[3]["error"] == "PromptNotFoundError"


@pytest.mark.parametrize(
    ("method", "args", "python"),
    [
        ("generate", ["x " * 500], {}),
        ("generate", ["x", {"maxNewTokens": 0}], {"max_new_tokens": 0}),
        ("generate", ["x", {"temperature": -1}], {"temperature": -1}),
        ("generate", ["x", {"topP": 0}], {"top_p": 0}),
        ("generate", ["x", {"seed": 1.5}], {"seed": 1.5}),
        ("generate", ["x", {"seed": -1}], {"seed": -1}),
        ("generate", ["x", {"stop": [""]}], {"stop": ("",)}),
        ("generate", ["x", {"numBeams": 2}], {"num_beams": 2}),
        ("generate", ["", {}], {}),
        ("generate", [{"other": "x"}, {}], {}),
        ("generate", ["x", {"prompt": "nobody"}], {"prompt": "nobody"}),
        ("generate", ["", {"inputIds": [512]}], {"input_ids": [512]}),
        ("generate", ["x", {"timeout": 0}], {"timeout": 0.0}),
        ("generate", ["x", {"timeout": -1}], {"timeout": -1.0}),
        ("generate", ["x", {"maxNewTokens": 3, "choices": [" a long choice of many tokens"]}],
         {"max_new_tokens": 3, "choices": (" a long choice of many tokens",)}),
        ("generate", ["x", {"chat": True}], {"chat": True}),
        ("classify", ["x", {"prompt": "story"}], {"prompt": "story"}),
        ("classify", ["x", {"prompt": "inside", "inputIds": [5]}], {"prompt": "inside", "input_ids": [5]}),
        ("tag", ["x", {"prompt": "story"}], {"prompt": "story", "task": "tag"}),
        ("check", ["story"], {"prompt": "story"}),
        ("embed", [["x"], {"pooling": "mean"}], {"pooling": "mean"}),
    ],
    ids=str,
)  # fmt: skip
def test_errors_are_those_of_python(tiny: Both, method: str, args: list[Any], python: dict[str, Any]) -> None:
    text = args[0]
    with pytest.raises(EdgePromptError) as caught:
        if method == "check":
            tiny.python.check(text)
        elif method == "embed":
            tiny.python.embed(text, **python)
        elif python.get("task") == "tag":
            tiny.python.run([edgeprompt.Request(text, python["prompt"], task="tag")])
        else:
            getattr(tiny.python, method)(text, **python)
    (found,) = tiny.calls([{"method": method, "args": args}])
    assert found.get("error") == type(caught.value).__name__, (found, str(caught.value))


def test_a_wrong_base_is_rejected(ask: Callable[..., Any], tiny_llama_package: Path, tiny: Both) -> None:
    prompt = PROMPTS / "sentiment.safetensors"
    with pytest.raises(EdgePromptError) as caught:
        tiny.python.add_prompt(prompt)
    (found,) = tiny.calls([{"prompt": str(prompt)}])
    assert found["error"] == type(caught.value).__name__ == "BaseMismatchError"
    (found,) = tiny.calls([{"prompt": str(prompt), "options": {"allowBaseMismatch": True}}])
    assert found["error"] == "BaseMismatchError"


@pytest.mark.parametrize("worker", [False, True])
def test_abort_takes_effect_between_steps(tiny: Both, worker: bool) -> None:
    tiny._options["worker"] = worker
    (found,) = tiny.calls([{"method": "generate", "args": ["x", {"maxNewTokens": 240}], "abortAfter": 10}])
    assert found.get("error") == "RequestCancelledError", found


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DistilBERT"])
def test_encoder(ask: Callable[..., Any], encoder_package: Callable[..., Path], family: str, tmp_path: Path) -> None:
    package = encoder_package(family)
    manifest = edgeprompt.load(package, options=QUIET).manifest
    tags, bare = ("O", "B-A", "I-A"), Template.parse("{text}")
    pair = Template.parse("{prompt}{question}{context}")
    prompts = _save(
        tmp_path,
        _head(manifest, "first", "classify", "first_text", ("a", "b", "c")),
        _head(manifest, "many", "classify", "mean", ("a", "b", "c"), problem_type="multi_label"),
        _head(manifest, "value", "classify", "mean_all", ("v",), problem_type="regression"),
        _head(manifest, "deep", "classify", "last", ("a", "b"), method="p-tuning-v2", template=bare),
        _head(manifest, "tags", "tag", "tokens", tags),
        _head(manifest, "question", "qa", "tokens_unshifted", ("s", "e"), template=pair),
        _head(manifest, "maybe", "qa", "tokens", ("s", "e"), template=pair, generation={"allow_no_answer": True}),
    )
    both = Both(ask, package, prompts)
    for name in ("first", "many", "value", "deep"):
        found = both.call("classify", TEXTS, {"prompt": name})
        _same_classes(both.python.classify(list(TEXTS), prompt=name), found, close=1e-5)
    text, question = TEXTS[0] + " Ünïcode in Paris, 1999.", "Who is in Paris?"
    (expected,) = both.python.run([edgeprompt.Request(text, "tags")])
    found = both.call("tag", text, {"prompt": "tags"})
    for name in ("spans", "words"):
        for one, other in zip(getattr(expected, name), found[name], strict=True):
            assert asdict(one) | {"score": 0} == other | {"score": 0}
            assert abs(one.score - other["score"]) <= 1e-5
    for name in ("question", "maybe"):
        (answer,) = both.python.run([edgeprompt.Request({"question": question, "context": text}, name)])
        found = both.call("answer", question, text, {"prompt": name})
        assert asdict(answer) | {"score": 0} == found | {"score": 0}
        assert abs(answer.score - found["score"]) <= 1e-5
    for pooling in ("mean", "cls", "last"):
        expected = both.python.embed(list(TEXTS), pooling=pooling)
        assert np.abs(expected - np.array(both.call("embed", TEXTS, {"pooling": pooling}))).max() <= 1e-5


@pytest.mark.parametrize("family", ["T5", "BART", "mBART"])
def test_encoder_decoder(
    ask: Callable[..., Any], seq2seq_package: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    package = seq2seq_package(family)
    manifest = edgeprompt.load(package, options=QUIET).manifest
    long = {"x": (" good", " very good"), "y": (" bad",)}
    said = {"decoder_prefix": " it"}
    prompts = _save(
        tmp_path,
        make_prompt(manifest, "words", verbalizer=long),
        make_prompt(manifest, "many", verbalizer=MANY),
        make_prompt(manifest, "deep", "prefix-tuning", verbalizer=long, template=Template.parse("{text}")),
        make_prompt(manifest, "story", seed=1, generation=said),
        _head(manifest, "tags", "tag", "tokens", ("O", "A")),
    )
    both = Both(ask, package, prompts)
    for name in ("words", "many", "deep"):
        _same_classes(both.python.classify(list(TEXTS), prompt=name), both.call("classify", TEXTS, {"prompt": name}))
    for settings in ({}, {**SAMPLED, "seed": 3}):
        asked = {"max_new_tokens": 12, **settings}
        for prompt in ("story", None):
            expected = [both.python.generate(text, prompt=prompt, **asked) for text in TEXTS]
            found = both.call("generate", TEXTS, {"prompt": prompt, **_js(asked)})
            assert [list(one.token_ids) for one in expected] == [one["tokenIds"] for one in found]
            assert [one.text for one in expected] == [one["text"] for one in found]
    (expected,) = both.python.run([edgeprompt.Request(TEXTS[0], "tags")])
    assert [asdict(one)["label"] for one in expected.words] == [
        one["label"] for one in both.call("tag", TEXTS[0], {"prompt": "tags"})["words"]
    ]
    (found,) = both.calls([{"method": "generate", "args": ["x", {"numBeams": 2}]}])
    assert found["error"] == "UnsupportedError"


def _real(ask: Callable[..., Any], package: Path, names: Sequence[str], texts: Sequence[str]) -> None:
    both = Both(ask, package, [PROMPTS / f"{name}.safetensors" for name in names])
    for name in names:
        found = both.call("classify", texts, {"prompt": name})
        _same_classes([both.python.classify(text, prompt=name) for text in texts], found)


def test_minilm(ask: Callable[..., Any], minilm_int8_package: Path, snippets: list[tuple[str, str]]) -> None:
    _real(ask, minilm_int8_package, ["minilm-sentiment", "minilm-source"], [text for text, _ in snippets[:40]])


def _generations(both: Both, texts: Sequence[str], settings: Sequence[dict[str, Any]]) -> None:
    calls = [
        {"method": "generate", "args": [text, {"prompt": "restore", **_js(one)}]}
        for text, one in zip(texts, settings, strict=True)
    ]
    for text, one, found in zip(texts, settings, both.calls(calls), strict=True):
        expected = both.python.generate(text, prompt="restore", **one)
        assert list(expected.token_ids) == found["value"]["tokenIds"], text


def test_smollm2_int4(ask: Callable[..., Any], smollm2_package: Path, snippets: list[tuple[str, str]]) -> None:
    texts = [text for text, _ in snippets[:6]]
    _real(ask, smollm2_package, ["sentiment"], texts)
    both = Both(ask, smollm2_package, [PROMPTS / "restore.safetensors"])
    _generations(both, texts[:2] * 2, [{"max_new_tokens": 16}] * 2 + [{"max_new_tokens": 16, "seed": 1, **SAMPLED}] * 2)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "block"), [("int4", 32), ("int4", 128), ("int8", 32)])
def test_smollm2_on_hundreds_of_texts(
    ask: Callable[..., Any], cached_package: Callable[..., Path], smollm2_gguf: Path, precision: str, block: int
) -> None:
    import csv

    name = f"smollm2-{precision}" + ("-128" if block == 128 else "")
    package = cached_package(name, smollm2_gguf, precision=precision, block_size=block)
    texts = []
    for file in ("movie", "source", "restore"):
        with (ROOT / f"examples/data/{file}.test.csv").open(encoding="utf-8", newline="") as opened:
            texts += [row["text"] for row in csv.DictReader(opened)]
    for begin in range(0, 200, 100):
        _real(ask, package, ["sentiment", "source"], texts[begin : begin + 100])
    both = Both(ask, package, [PROMPTS / "restore.safetensors"])
    _generations(both, texts[-50:], [{"max_new_tokens": 32}] * 50)
    _generations(both, texts[:20], [{"max_new_tokens": 32, "seed": seed, **SAMPLED} for seed in range(20)])


@pytest.mark.parametrize(
    "fields",
    [
        {"no_repeat_ngram_size": 1, "repetition_penalty": 5.0},
        {"suppress_tokens": [*range(100, 500)], "min_new_tokens": 5},
        {"begin_suppress_tokens": [429], "bad_words_ids": [[389], [300, 301]]},
    ],
    ids=str,
)
def test_the_bases_generation_config(
    ask: Callable[..., Any], tiny_llama_package: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    import json
    import shutil

    package = tmp_path / "package"
    shutil.copytree(tiny_llama_package, package)
    manifest = json.loads((package / "edgeprompt.json").read_text("utf-8"))
    (package / "edgeprompt.json").write_text(json.dumps({**manifest, "generation": fields}), "utf-8")
    both, plain = Both(ask, package, []), edgeprompt.load(tiny_llama_package, options=QUIET)
    expected = [both.python.generate(text, max_new_tokens=40) for text in TEXTS]
    found = both.call("generate", TEXTS, {"maxNewTokens": 40})
    assert [list(one.token_ids) for one in expected] == [one["tokenIds"] for one in found]
    bare = [plain.generate(text, max_new_tokens=40) for text in TEXTS]
    assert [one.token_ids for one in expected] != [one.token_ids for one in bare]


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
def test_no_text_reads_a_prompts_rows(
    ask: Callable[..., Any],
    tiny_llama_package: Path,
    encoder_package: Callable[[str], Path],
    seq2seq_package: Callable[[str], Path],
    architecture: str,
    tmp_path: Path,
) -> None:
    """Two tokens of the tokenizer have ids behind the base's embedding, where the rows of prompts begin."""
    made = {"encoder": lambda: encoder_package("BERT"), "encoder-decoder": lambda: seq2seq_package("T5")}
    package = package_before_the_check(
        made.get(architecture, lambda: tiny_llama_package)(), tmp_path / "package", "zyzzyva"
    )
    with edgeprompt.load(package, options=QUIET) as runtime:
        behind = Template.parse("{text} and {prompt}")
        if architecture == "encoder":
            prompt = with_head(runtime, "behind", 2, "mean", template=behind)
            pair = with_head(
                runtime,
                "pair",
                2,
                "tokens",
                task="qa",
                labels=(),
                template=Template.parse("{prompt}{question}{context}"),
            )
        else:
            prompt, pair = make_prompt(runtime.manifest, "behind", template=behind), None
    calls: list[dict[str, Any]] = [
        {"method": {"encoder": "classify"}.get(architecture, "generate"), "args": ["a zyzzyva b", {"prompt": "behind"}]}
    ]
    if pair is not None:
        calls += [
            {"method": "answer", "args": ["a", "zyzzyva", {"prompt": "pair"}]},
            {"method": "embed", "args": [["zyzzyva"]]},
        ]
    saved = _save(tmp_path, *(one for one in (prompt, pair) if one is not None))
    found = ask("serve", package=str(package), calls=[*({"prompt": str(one)} for one in saved), *calls])
    for one in found[len(saved) :]:
        assert one.get("error") == "InputError", one
        assert "text holds 512 ('zyzzyva'); ids of this base are 0 to 511" in one["message"]
