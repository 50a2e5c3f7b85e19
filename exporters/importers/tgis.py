"""IBM TGIS prefix folders: `<id>/decoder.pt`, and `<id>/encoder.pt` for encoder-decoders, 2-D each."""

from __future__ import annotations

from pathlib import Path

from edgeprompt import names
from edgeprompt.errors import SourceError, UnsupportedError
from exporters.importers.foreign import BaseFacts, ForeignPrompt, ReadOptions, as_rows, prompt_name
from exporters.importers.reading import Contents, as_array, is_there, load_pickle

DECODER, ENCODER = "decoder.pt", "encoder.pt"


def recognises(source: Path, contents: Contents) -> bool:
    """A folder with decoder.pt or encoder.pt, or one of these files."""
    return bool({DECODER, ENCODER} & (contents.files or {source.name}))


def read(source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
    """The encoder's prompt of an encoder-decoder, else the decoder's."""
    folder = source if source.is_dir() else source.parent
    there = [name for name in (ENCODER, DECODER) if is_there(folder / name)]
    if not there:
        raise SourceError(f"{str(folder)!r} has neither {DECODER} nor {ENCODER}")
    if len(there) == 2:
        raise UnsupportedError(
            f"{str(folder)!r} has a prompt in the decoder's input too ({DECODER}); edgeprompt places virtual tokens in "
            "the encoder's input only: train without the decoder part"
        )
    wanted = ENCODER if base and base.architecture == names.ENCODER_DECODER else DECODER
    if base and there != [wanted]:
        raise SourceError(
            f"{str(folder)!r} holds {there[0]}; {base.base.name} is {base.architecture} and needs {wanted}"
        )
    tensor = load_pickle(folder / there[0])
    if not hasattr(tensor, "layout"):
        raise SourceError(f"{there[0]} holds a {type(tensor).__name__}, expected one tensor")
    rows = as_rows(as_array(tensor, there[0]), there[0], base)
    return [
        ForeignPrompt(
            prompt_name(folder),
            "prompt-tuning",
            prompt_embeddings=rows,
            source={"format": "tgis"},
            found=(f"{there[0]} {list(rows.shape)}",),
        )
    ]
