"""What is fuzzed on a small decoder-only package: files, templates, sampling, requests, and the scheduler."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from edgeprompt import EdgePromptError, EngineOptions, GenerationOptions, PromptFile, Request, Runtime, names
from edgeprompt.decoding.detokenizer import Detokenizer
from edgeprompt.decoding.sampling import Sampler, resolve
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import Golden, Head, HeadStep, TunedFor, from_bytes
from edgeprompt.prompts.template import Template
from tests.stress.fuzz_inputs import CUTS, damaged, dumps, mostly, mutations, with_metadata

TEXTS = ("the film was good", "a very long story " * 6, "", "\0", "é😀", "<eos>", "\ud800")


class Targets:
    """What is fuzzed, on one package. Each target is (strategy, check); a check answers whether the input was taken."""

    def __init__(self, package: Path) -> None:
        self._folder = package
        self._package = open_package(package)
        self.names = ("prompt_file", "prompt_bytes", "manifest", "template", "text", "sampler", "requests", "scheduler")
        options = EngineOptions(provider="cpu", threads=1, spinning=False, max_batch=3, max_queue=6, prefix_budget=9000)
        self._runtime = Runtime(self._package, options)
        self._runtime._engine._lanes[0].graph.chunk = 16  # type: ignore[attr-defined]
        for number, length in enumerate((3, 8)):
            self._runtime.add_prompt(self._prompt(f"p{number}", length))
        self._pool = [
            Request(text, prompt, task=task, options=GenerationOptions(max_new_tokens=tokens, temperature=t, seed=4))
            for text, prompt, task, tokens, t in itertools.product(
                TEXTS[:2], ("p0", "p1"), ("classify", "generate"), (1, 9), (0.0, 2.0)
            )
        ]
        self._expected = [self._answer(self._runtime.run([request])[0]) for request in self._pool]

    def close(self) -> None:
        """Close the runtime."""
        self._runtime.close()

    def target(self, name: str) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """Strategy and check."""
        found: tuple[st.SearchStrategy[Any], Callable[[Any], bool]] = getattr(self, "_" + name)
        return found

    def _prompt(self, name: str, length: int = 4) -> PromptFile:
        size, rng = self._package.manifest.geometry, np.random.default_rng(length)
        return PromptFile(
            name=name,
            method="prompt-tuning",
            task="classify",
            base=self._package.manifest.base,
            template=Template.parse("{prompt:2}the {text}{prompt}\nA:" if length == 8 else "{prompt}{text}\nA:"),
            prompt_embeddings=rng.normal(0, 0.3, (length, size.hidden_size)).astype(np.float32),
            verbalizer={"x": (" good", " very good"), "y": (" bad",)},
            labels=("x", "y"),
            calibration=(0.5, -0.5),
            tokenizer_fingerprint=self._package.manifest.tokenizer_fingerprint,
            generation={"max_new_tokens": 4, "stop": ["\n"], "temperature": 0.5, "top_k": 5, "chat": False},
            tuned_for=TunedFor("fp32", None),
            training={"steps": 3},
            golden=Golden({"text": "the film"}, "x", (5, 6), {"x": 0.5}),
        )

    @staticmethod
    def _answer(result: Any) -> Any:
        return result.token_ids if hasattr(result, "token_ids") else (result.label, list(result.logits.values()))

    def _served(self, prompt: PromptFile) -> None:
        """A file that was taken must serve, or say why not."""
        runtime = self._runtime
        name = runtime.add_prompt(prompt)
        with ours():
            runtime.run([Request(dict.fromkeys(prompt.template.slots, "a film"), name)])
        with ours():
            runtime.generate(dict.fromkeys(prompt.template.slots, "a film"), prompt=name)
        with ours():
            runtime.check(name)
        if name not in ("p0", "p1"):
            runtime.remove_prompt(name)

    @cached_property
    def _prompt_file(self) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """Metadata of good files (virtual tokens, a prefix, a head), changed."""
        whole, size = self._prompt("p9"), self._package.manifest.geometry
        shape = (size.num_layers, 2, size.num_key_value_heads, 4, size.head_size)
        head = {"score.weight": np.ones((2, size.hidden_size), np.float32), "score.bias": np.ones(2, np.float32)}
        kinds = [
            whole,
            dataclasses.replace(
                whole, method="prefix-tuning", prompt_embeddings=None, past_key_values=np.ones(shape, np.float32)
            ),
            dataclasses.replace(
                whole, verbalizer={}, calibration=(), head=head, head_spec=Head("last", (HeadStep("linear", "score"),))
            ),
        ]

        def check(case: tuple[PromptFile, Any]) -> bool:
            kind, metadata = case
            prompt = from_bytes(with_metadata(kind.to_bytes(), metadata))
            assert from_bytes(prompt.to_bytes()).metadata() == prompt.metadata()
            self._served(prompt)
            return True

        return st.sampled_from(kinds).flatmap(lambda kind: st.tuples(st.just(kind), mutations(kind.metadata()))), check

    @cached_property
    def _prompt_bytes(self) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """Bytes of a good file, changed and cut."""
        good = self._prompt("p9").to_bytes()
        (header,) = struct.unpack("<Q", good[:8])

        def check(case: tuple[bool, list[tuple[float, int]]]) -> bool:
            front, cuts = case
            data = damaged(good[: 8 + header], cuts) + good[8 + header :] if front else damaged(good, cuts)
            self._served(from_bytes(data))
            return True

        return st.tuples(st.booleans(), CUTS), check

    @cached_property
    def _manifest(self) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """A good manifest, changed; one that is taken opens the package, or says why not."""
        good = json.loads((self._folder / names.MANIFEST).read_text("utf-8"))
        options = EngineOptions(provider="cpu", threads=1, spinning=False)

        def check(data: Any) -> bool:
            manifest = Manifest.from_json(dumps(data))
            assert Manifest.from_json(manifest.to_json()) == manifest
            package = dataclasses.replace(self._package, manifest=manifest)
            with ours(), Runtime(package, options) as runtime:
                runtime.generate("a film", max_new_tokens=2)
            return True

        return mutations(good), check

    @cached_property
    def _template(self) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """Written and stored templates, and what they encode to."""
        slots = ["{prompt}", "{prompt:2}", "{prompt:0}", "{text}", "{a_b}", "{mask}"]
        pieces = st.sampled_from([*slots, "{", "}", "{{", "}}", "{:}", "the ", " "])
        good = (
            "{prompt}{text}",
            "{prompt}{text}\nA:",
            "a {prompt:2}{text}{prompt}",
            "{prompt}{a} and {b}",
            "{{{text}}}",
        )
        written = st.sampled_from(good) | st.lists(pieces | st.text(max_size=3), max_size=7).map("".join)
        stored = mutations([{"virtual_tokens": None}, {"literal": "a"}, {"slot": "text"}, {"mask": True}])
        first = self._package.manifest.geometry.vocab_size

        def check(case: tuple[Any, str, int, int | None]) -> bool:
            form, text, count, most = case
            template = Template.parse(form) if isinstance(form, str) else Template.from_json(form)
            assert Template.from_json(template.to_json()) == template
            if all(name.isidentifier() and name not in ("prompt", "mask") for name in template.slots):
                assert str(Template.parse(str(template))) == str(template)
            ids = template.encode(
                self._package.tokenizer,
                dict.fromkeys(template.slots, text),
                num_virtual_tokens=count,
                first_virtual_id=first,
                max_length=most,
            )
            assert most is None or len(ids) <= most
            virtual = [token for token in ids if token >= first]
            placed = "virtual_tokens" in str(template.to_json())
            assert virtual == (list(range(first, first + count)) if placed else [])
            return True

        return st.tuples(
            written | stored,
            st.sampled_from(TEXTS) | st.text(max_size=20),
            st.integers(0, 9),
            st.none() | st.integers(0, 40),
        ), check

    @cached_property
    def _text(self) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """Any ids, streamed: the pieces are the text, cut at the first stop string."""
        tokenizer, vocab = self._package.tokenizer, self._package.manifest.geometry.vocab_size

        def check(case: tuple[list[int], list[str]]) -> bool:
            ids, stop = case
            detokenizer, pieces = Detokenizer(tokenizer.decode, stop), []
            for token in ids:
                pieces.append(detokenizer.add(token))
                if detokenizer.stopped:
                    break
            pieces.append(detokenizer.finish())
            whole = tokenizer.decode(ids)
            assert "".join(pieces) == detokenizer.text
            if not any(word in whole for word in stop):
                assert detokenizer.text == whole
            else:
                assert whole.startswith(detokenizer.text)
                assert not any(word in detokenizer.text for word in stop)
            return True

        words = st.text(st.sampled_from("aeth .,é\n"), min_size=1, max_size=3)
        return st.tuples(st.lists(st.integers(0, vocab - 1), max_size=30), st.lists(words, max_size=2)), check

    @cached_property
    def _sampler(self) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """Any logits and any options: a token that the options allow."""
        number = st.none() | st.floats(allow_subnormal=True) | st.integers(-2, 50) | st.sampled_from([1e-45, "1", True])
        real, whole = mostly(st.floats(0.05, 1), number), mostly(st.integers(1, 20), number)
        options = st.fixed_dictionaries(
            {},
            optional={
                **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), real),
                **dict.fromkeys(("top_k", "seed", "max_new_tokens"), whole),
            },
        )

        def check(case: tuple[list[float], dict[str, Any], dict[str, Any]]) -> bool:
            values, given_options, defaults = case
            logits = np.asarray(values, np.float32)
            before = logits.copy()
            sampling = resolve(GenerationOptions(**given_options), defaults)
            sampler = Sampler(sampling, [0, 1, 99])
            for _ in range(3):
                token = sampler(logits)
                assert 0 <= token < len(values)
                if sampling.top_k and sampling.temperature and sampling.repetition_penalty == 1:
                    assert int((logits > logits[token]).sum()) < sampling.top_k
            assert np.array_equal(before, logits, equal_nan=True)
            return True

        logit = mostly(st.floats(-1e4, 1e4, width=32), st.sampled_from([-math.inf, math.inf, math.nan, 0.0]))
        return st.tuples(st.lists(logit, min_size=1, max_size=12), options, options), check

    @cached_property
    def _requests(self) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """Any request: an answer, or one of our errors; the runtime goes on."""
        odd = st.none() | st.integers(-3, 600) | st.floats() | st.text(max_size=4) | st.lists(st.integers(-1, 600))
        short = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)
        options = st.fixed_dictionaries(
            {"max_new_tokens": mostly(st.integers(1, 6), odd)},
            optional={
                "temperature": mostly(st.floats(0, 3), odd),
                "top_k": mostly(st.integers(0, 600), odd),
                "top_p": mostly(st.floats(0.01, 1), odd),
                "min_p": mostly(st.floats(0, 1), odd),
                "repetition_penalty": mostly(st.floats(0.5, 2), odd),
                "seed": mostly(st.integers(0, 1 << 60), odd),
                "logprobs": st.booleans(),
                "stop": mostly(short | st.lists(short, max_size=3), odd),
                "choices": mostly(st.lists(short, max_size=3), odd),
            },
        )
        text = st.sampled_from(TEXTS[:4]) | st.text(max_size=30)
        fields = st.fixed_dictionaries(
            {"text": mostly(text | st.fixed_dictionaries({"text": text}), odd | st.sampled_from(TEXTS))},
            optional={
                "prompt": mostly(st.sampled_from([None, "p0", "p1"]), st.sampled_from(["p7", "../p0", ""]) | odd),
                "input_ids": mostly(st.none() | st.lists(st.integers(0, 511), min_size=1, max_size=12), odd),
                "task": mostly(st.sampled_from([None, "classify", "generate"]), st.sampled_from(["tag", "embed", ""])),
                "timeout": mostly(st.sampled_from([None, 20]), st.just(0) | odd),
                "truncate": st.booleans(),
                "chat": mostly(st.just(False), st.booleans()),
            },
        )

        def check(case: tuple[dict[str, Any], dict[str, Any]]) -> bool:
            request = Request(**case[0], options=GenerationOptions(**case[1]))
            try:
                self._runtime.run([request])
                if request.prompt is None or request.task != "classify":
                    "".join(self._runtime.stream(request))
            finally:
                assert self._answer(self._runtime.run([self._pool[0]])[0]) == self._expected[0]
            return True

        return st.tuples(fields, options), check

    @cached_property
    def _scheduler(self) -> tuple[st.SearchStrategy[Any], Callable[[Any], bool]]:
        """Requests that come, go and are cancelled in any order: each answer is that of the request alone."""
        steps = st.lists(
            st.tuples(
                st.sampled_from(["ask", "cancel", "late", "stream", "replace", "wait"]),
                st.integers(0, len(self._pool) - 1),
            ),
            max_size=16,
        )

        def check(case: list[tuple[str, int]]) -> bool:
            runtime = self._runtime
            jobs: list[tuple[int, Future[Any]]] = []
            for kind, index in case:
                request = self._pool[index]
                with ours():
                    if kind == "late":
                        request = dataclasses.replace(request, timeout=0.0005)
                    if kind == "replace":
                        runtime.add_prompt(self._prompt("p2", 3 + index % 4))
                        jobs.append((-1, runtime.submit(dataclasses.replace(request, prompt="p2"))))
                        runtime.remove_prompt("p2")
                    elif kind == "stream":
                        pieces = runtime.stream(request.text, prompt=request.prompt, max_new_tokens=30, temperature=5)
                        if index % 2:
                            next(pieces, None)
                    elif kind == "wait" and jobs:
                        jobs[index % len(jobs)][1].exception(60)
                    else:
                        jobs.append((index, runtime.submit(request)))
                        if kind == "cancel":
                            jobs[-1][1].cancel()
            for index, job in jobs:
                error = job.exception(60)
                if error is not None:
                    assert isinstance(error, EdgePromptError), repr(error)
                elif index >= 0:
                    found, expected = self._answer(job.result()), self._expected[index]
                    close = isinstance(expected[-1], list) and np.allclose(found[1], expected[1], atol=1e-4)
                    assert found == expected or (close and found[0] == expected[0])
            return True

        return steps, check


@contextmanager
def ours() -> Iterator[None]:
    """What may be refused, with one of our errors."""
    with suppress(EdgePromptError):
        yield
