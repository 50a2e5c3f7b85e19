"""Coverage-guided fuzzing of what reads other people's bytes, with atheris (libFuzzer); its own environment is best.

    pip install atheris numpy safetensors tokenizers hypothesis onnxruntime
    python -m tests.stress.fuzz_atheris prompt_file|manifest|template PACKAGE [libFuzzer options, e.g. -runs=1000000]

An input is read, or refused with an `EdgePromptError`; anything else stops the run and is written to a crash file.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgeprompt"]):
    from edgeprompt import EdgePromptError, names
    from edgeprompt.package.folder import open_package
    from edgeprompt.package.manifest import Manifest
    from edgeprompt.prompts.file import from_bytes
    from edgeprompt.prompts.template import Template

TOKENIZER = open_package(sys.argv[2]).tokenizer


def prompt_file(data: bytes) -> None:
    """A file that is read is written again as it was."""
    prompt = from_bytes(data)
    assert from_bytes(prompt.to_bytes()).metadata() == prompt.metadata()


def manifest(data: bytes) -> None:
    """A manifest that is read is written again as it was."""
    found = Manifest.from_json(data)
    assert Manifest.from_json(found.to_json()) == found


def template(data: bytes) -> None:
    """A template that parses encodes."""
    found = Template.parse(data.decode("utf-8", errors="replace"))
    assert str(Template.parse(str(found))) == str(found)
    assert Template.from_json(found.to_json()) == found
    found.encode(
        TOKENIZER, dict.fromkeys(found.slots, "the film"), num_virtual_tokens=4, first_virtual_id=512, max_length=30
    )


TARGETS = {"prompt_file": prompt_file, "manifest": manifest, "template": template}
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SEEDS = {
    "prompt_file": [path.read_bytes() for path in sorted(GOLDEN.glob("prompt_*.safetensors"))],
    "manifest": [(Path(sys.argv[2]) / names.MANIFEST).read_bytes()],
    "template": [b"{prompt}{text}\nA:", b"a {prompt:2}{text}{prompt}", b"{{{question}}} {context}{mask}"],
}


def main() -> None:
    """Fuzz one target, from its seeds on."""
    target, corpus = TARGETS[sys.argv[1]], Path("work") / "fuzz" / sys.argv[1]
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[sys.argv[1]]):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        with suppress(EdgePromptError):
            target(data)

    atheris.Setup([sys.argv[0], str(corpus), "-max_len=8192", f"-artifact_prefix={corpus}/", *sys.argv[3:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
