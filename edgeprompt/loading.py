"""From a folder to a runtime, its sessions first: what else a start does goes on beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeprompt.options import EngineOptions
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import open_package

if TYPE_CHECKING:
    from edgeprompt.prompts.file import PromptFile
    from edgeprompt.runtime import Runtime


def load(
    path: str | os.PathLike[str],
    *,
    provider: str = "auto",
    threads: int | None = None,
    prompts: Iterable[str | os.PathLike[str] | PromptFile] = (),
    options: EngineOptions | None = None,
) -> Runtime:
    """Open a package.

    Args:
        path: the folder that `edgeprompt export` made.
        provider: "auto" (CUDA if available, else the CPU), "cpu", "cuda", or another provider by name.
        threads: intra-op threads; None: one per physical core.
        prompts: prompts to add.
        options: budgets and limits; `provider` and `threads` above override its fields.

    Raises:
        PackageError: the folder is no package, or a broken one.
        ProviderError: the provider is not available.
    """
    chosen = options or EngineOptions()
    chosen = replace(
        chosen,
        provider=chosen.provider if provider == "auto" else provider,
        threads=chosen.threads if threads is None else threads,
    )
    package = open_package(path)
    sessions = Sessions(package, chosen)
    from edgeprompt.runtime import Runtime  # here: imported beside the sessions

    runtime = Runtime(package, chosen, sessions)
    try:
        for prompt in prompts:
            runtime.add_prompt(prompt)
    except BaseException:
        runtime.close()
        raise
    return runtime
