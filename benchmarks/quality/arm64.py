"""Whether the runtime answers on an ARM processor as it does here.

    make arm64        (python -m benchmarks.quality.arm64 [--table])

qemu-user emulates the processor. Debian's packages for arm64 (libc, Python) and the wheels for arm64 of what the
runtime needs are unpacked into work/arm64; nothing is installed, and root is not needed. MiniLM at int8 labels ten
texts, and SmolLM2 at int4 one. Needs apt on Debian 12. Writes benchmarks/results/arm64.json; `--table` prints it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import MINILM, WORK, package  # noqa: E402

OUT = ROOT / "benchmarks/results/arm64.json"
FOLDER = WORK / "arm64"
SYSTEM, WHEELS, TOOLS = FOLDER / "root", FOLDER / "wheels", FOLDER / "tools"
DEBIAN = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6")
RUNTIME = ("numpy", "safetensors", "tokenizers", "onnxruntime")
PLATFORMS = ("manylinux_2_17_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64", "manylinux2014_aarch64")
CPUINFO = """processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd0b
CPU revision\t: 0

"""
"""An ARM processor for ONNX Runtime, which reads /proc/cpuinfo; qemu shows the prefix's file."""
ASK = """
import json, platform, sys, time
import edgeprompt, onnxruntime
from edgeprompt import EngineOptions
said = []
for package, prompt, texts in json.load(sys.stdin):
    began = time.perf_counter()
    options = EngineOptions(provider="cpu", threads=1, allow_other_weights=True)
    with edgeprompt.load(package, options=options) as runtime:
        name = runtime.add_prompt(prompt)
        found = [runtime.classify(text, prompt=name) for text in texts]
    said.append([[one.label, dict(one.logits)] for one in found] + [time.perf_counter() - began])
print(json.dumps({"machine": platform.machine(), "onnxruntime": onnxruntime.__version__, "said": said}))
"""


def questions() -> dict[str, tuple[Path, Path, list[str]]]:
    """Name -> package, prompt, texts."""
    with (ROOT / "examples/data/movie.test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    prompts = ROOT / "examples/prompts"
    return {
        "minilm-int8": (package("int8", MINILM), prompts / "minilm-sentiment.safetensors", texts[:10]),
        "smollm2-int4": (package("int4"), prompts / "sentiment.safetensors", texts[:1]),
    }


def unpack(emulator: Path | None) -> None:
    """Debian's packages and the wheels, once."""
    if (FOLDER / ".done").exists():
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    debs = _debian("arm64", DEBIAN)
    for file in debs:
        _run("dpkg-deb", "--extract", file, SYSTEM)
    if emulator is None:
        for file in _debian("amd64", ("qemu-user-static",)):
            _run("dpkg-deb", "--extract", file, TOOLS)
    (SYSTEM / "proc").mkdir(exist_ok=True)
    (SYSTEM / "proc/cpuinfo").write_text(CPUINFO)
    platforms = [word for one in PLATFORMS for word in ("--platform", one)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _run(*pip, "-c", ROOT / "constraints.txt", "--target", WHEELS, "--only-binary=:all:", "--python-version", "3.11",
         *platforms, *RUNTIME)  # fmt: skip
    (FOLDER / ".done").touch()


def _debian(architecture: str, names: tuple[str, ...]) -> list[Path]:
    """Packages and what they depend on, downloaded with settings of our own."""
    home = FOLDER / f"apt-{architecture}"
    for folder in ("lists/partial", "cache/archives/partial"):
        (home / folder).mkdir(parents=True)
    settings = home / "apt.conf"
    settings.write_text(
        f'APT::Architecture "{architecture}";\nAPT::Architectures {{ "{architecture}"; }};\nDir::State "{home}";\n'
        f'Dir::State::status "/dev/null";\nDir::Cache "{home}/cache";\nAPT::Sandbox::User "root";\n'
    )
    apt = {"env": {**os.environ, "APT_CONFIG": str(settings)}}
    _run("apt-get", "-qq", "update", **apt)
    _run("apt-get", "-qq", "-y", "-d", "--no-install-recommends", "install", *names, **apt)
    return sorted((home / "cache/archives").glob("*.deb"))


def _run(*command: object, **options: Any) -> str:
    done = subprocess.run([str(word) for word in command], text=True, stdout=subprocess.PIPE, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command[:4]))} ... ended with {done.returncode}")
    return done.stdout


def measure() -> dict[str, Any]:
    """Both processors' answers."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing: the emulated system is made of Debian's packages")
    installed = shutil.which("qemu-aarch64-static")
    unpack(Path(installed) if installed else None)
    emulator = installed or TOOLS / "usr/bin/qemu-aarch64-static"
    asked = questions()
    given = json.dumps([[str(one), str(prompt), texts] for one, prompt, texts in asked.values()])
    python = SYSTEM / "usr/bin/python3.11"
    # Python's own variables reach the emulated one as they are; its libraries are found below the prefix.
    emulated = {
        "PATH": os.environ["PATH"], "QEMU_LD_PREFIX": str(SYSTEM), "PYTHONPATH": f"{ROOT}:{WHEELS}",
        "PYTHONHOME": str(SYSTEM / "usr"), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    there = json.loads(_run(emulator, python, "-c", ASK, input=given, env=emulated, timeout=3600).splitlines()[-1])
    here = json.loads(_run(sys.executable, "-c", ASK, input=given, cwd=ROOT).splitlines()[-1])
    assert there["machine"] == "aarch64", there["machine"]
    found = {}
    for name, ours, theirs in zip(asked, here["said"], there["said"], strict=True):
        pairs = list(zip(ours[:-1], theirs[:-1], strict=True))
        found[name] = {
            "texts": len(pairs), "same_labels": sum(one[0] == other[0] for one, other in pairs),
            "logits_most": max(abs(one[1][label] - other[1][label]) for one, other in pairs for label in one[1]),
            "seconds": theirs[-1],
        }  # fmt: skip
    emulator_version = _run(emulator, "--version").splitlines()[0]
    return {"machine": describe(), "emulator": emulator_version, "onnxruntime": there["onnxruntime"], "found": found}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        "| package | texts | same labels | logits apart, most | seconds, emulated |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows += [f"| {name} | {one['texts']} | {one['same_labels']} | {one['logits_most']:.1e} | {one['seconds']:.0f} |"
             for name, one in result["found"].items()]  # fmt: skip
    return "\n".join(
        [*rows, "", f"{result['emulator']}, onnxruntime {result['onnxruntime']}. {line(result['machine'])}"]
    )


def main() -> None:
    """Measure and write, or print the table; exit code 1 where a label differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what was measured")
    if not parser.parse_args().table:
        began = time.perf_counter()
        OUT.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
        print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    result = json.loads(OUT.read_text("utf-8"))
    print(table(result))
    if any(one["same_labels"] != one["texts"] for one in result["found"].values()):
        raise SystemExit("a label differs from this processor's")


if __name__ == "__main__":
    main()
