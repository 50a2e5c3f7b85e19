"""One start of edgeprompt, stage by stage, for `benchmarks/ablations/cold_start.py`.

Imports little itself, since that counts.

`stages.py start FOLDER PACKAGE STARTED` prints the milliseconds of `cold_start.STAGES`, `stages.py alone ...` those of
`cold_start.ALONE`; STARTED is the clock's reading when the process was started.
"""

import sys
import time
from itertools import pairwise

TEXT = "a fine film with a good heart , though its end comes late ; the actors are good"


def start(folder: str, package: str, started: float) -> list[float]:
    """Seconds of every stage up to the first label."""
    times = [started, time.monotonic()]
    import edgeprompt

    options = edgeprompt.EngineOptions(
        provider="cpu", threads=2, cache_folder=f"{folder}/packed", allow_other_weights=True, reuse_texts=False
    )
    _ = edgeprompt.load
    times.append(time.monotonic())
    import numpy  # noqa: F401

    times.append(time.monotonic())
    import onnxruntime  # noqa: F401

    times.append(time.monotonic())
    runtime = edgeprompt.load(f"{folder}/{package}", options=options)
    times.append(time.monotonic())
    runtime.add_prompt(f"{folder}/prompt-16/sentiment.safetensors")
    times.append(time.monotonic())
    runtime.classify(TEXT, prompt="sentiment")
    return [*times, time.monotonic()]


def alone(folder: str, package: str, _: float) -> list[float]:
    """What goes on side by side in a start, one after the other."""
    import onnxruntime  # noqa: F401

    from edgeprompt.options import EngineOptions
    from edgeprompt.ort.session import Sessions
    from edgeprompt.package.folder import open_package

    opened = open_package(f"{folder}/{package}")
    options = EngineOptions(provider="cpu", threads=2, cache_folder=f"{folder}/packed", allow_other_weights=True)
    times = [time.monotonic()]
    _session = Sessions(opened, options)["model"]
    times.append(time.monotonic())
    import edgeprompt.engines.decoder.engine
    import edgeprompt.runtime  # noqa: F401

    times.append(time.monotonic())
    _ = opened.tokenizer
    return [*times, time.monotonic()]


if __name__ == "__main__":
    kind, where, what, clock = sys.argv[1:]
    readings = {"start": start, "alone": alone}[kind](where, what, float(clock))
    print([after - before for before, after in pairwise(readings)])
