"""What is asked: texts of a given number of tokens, and prompts where none is given."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgeprompt import names
from edgeprompt.bench.options import SYNTHETIC_TOKENS
from edgeprompt.package.folder import Package
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.file import Head, HeadStep, PromptFile, load_prompt, save_prompt
from edgeprompt.prompts.template import Template

PASSAGE = (
    "The film opens on a quiet street and takes its time before anything happens, which some will find slow and others "
    "patient. The two leads carry most of it; their scenes have a warmth that the script alone does not explain. The "
    "second half is weaker, with a chase that belongs in another story, but the ending returns to what the film does "
    "best and leaves a question open. Music and light are used with care, the costumes look lived in, and even the "
    "smallest parts are played as if somebody had written a life for them. It is not a great film, yet it is hard to "
    "forget, and after a week one or two of its pictures still come back at odd moments of the day. "
)
INSTRUCTION = "Read the text and answer with one of these words: {labels}.\n"
PLAIN_INSTRUCTION = "Read the text below with care, and then continue it in the same style and mood.\n"


def text_of(tokenizer: Tokenizer, count: int, shift: int = 0) -> str:
    """English text of `count` tokens; `shift` begins it at another word, so that texts differ."""
    words = PASSAGE.split()
    shift %= len(words)
    words = words[shift:] + words[:shift]
    text = " ".join(words * (count // len(words) + 2))
    return tokenizer.truncate(text, count)


def instruction_of(prompt: PromptFile) -> str:
    """What a hard prompt would say in place of the virtual tokens."""
    initial = prompt.training.get("init_text")
    if isinstance(initial, str) and initial:
        return initial
    labels = tuple(prompt.verbalizer) or prompt.labels
    return INSTRUCTION.format(labels=", ".join(labels)) if labels else PLAIN_INSTRUCTION


def headless(prompt: PromptFile) -> PromptFile:
    """The same rows for free text where a trained head answers: what the base itself is asked by."""
    if prompt.head_spec is None:
        return prompt
    return dataclasses.replace(prompt, task="generate", labels=(), head={}, head_spec=None, calibration=())


def synthetic_prompt(package: Package, *, name: str = "synthetic", seed: int = 0) -> PromptFile:
    """A random prompt that fits the package: label words for decoders, a linear head for encoders."""
    manifest = package.manifest
    size = manifest.geometry
    random = np.random.default_rng(seed)
    rows = random.normal(0, 0.05, (SYNTHETIC_TOKENS, size.embedding_size or size.hidden_size)).astype(np.float32)
    prompt = PromptFile(
        name=name,
        method="prompt-tuning",
        task="classify",
        base=manifest.base,
        template=Template.parse("{prompt}{text}"),
        prompt_embeddings=rows,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
    )
    if manifest.architecture == names.ENCODER_ONLY:
        weight = random.normal(0, 0.05, (2, size.hidden_size)).astype(np.float32)
        return dataclasses.replace(
            prompt,
            labels=("negative", "positive"),
            head={"classifier.weight": weight},
            head_spec=Head("mean", (HeadStep("linear", "classifier"),)),
        )
    words = {"negative": (" negative",), "positive": (" positive",)}
    return dataclasses.replace(prompt, verbalizer=words)


def another_like(prompt: PromptFile, name: str, seed: int) -> PromptFile:
    """A prompt of the same shape and task with other values: another task, as far as time and memory go."""
    scale = np.float32(1 + (seed + 1) * 1e-4)

    def scaled(tensor: np.ndarray | None) -> np.ndarray | None:
        return None if tensor is None else (tensor * scale).astype(tensor.dtype)

    return dataclasses.replace(
        prompt,
        name=name,
        prompt_embeddings=scaled(prompt.prompt_embeddings),
        past_key_values=scaled(prompt.past_key_values),
        encoder_past_key_values=scaled(prompt.encoder_past_key_values),
    )


@contextmanager
def prompt_files(package: Package, wanted: tuple[Path, ...]) -> Iterator[dict[Path, PromptFile]]:
    """The prompts to measure, each with its file: those wanted, else the package's, else a synthetic one."""
    with tempfile.TemporaryDirectory(prefix="edgeprompt-bench-") as scratch:
        paths = wanted or package.prompt_paths
        found = {Path(path): load_prompt(path) for path in paths}
        if not found:
            file = Path(scratch) / "synthetic.safetensors"
            found[file] = synthetic_prompt(package)
            save_prompt(found[file], file)
        for prompt in found.values():
            prompt.check_base(package.manifest)
        yield found
