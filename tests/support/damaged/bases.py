"""Damaged base models: safetensors, shards, PyTorch files, GGUF; decoders, encoders and encoder-decoders."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.damaged import Damage

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 134515008\n"
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "num_hidden_layers": 2}
Tensors = dict[str, Any]


@functools.cache
def model(kind: str) -> Any:
    """A random model: llama (untied head), gpt2 and qwen2 (tied), bert (with its head), t5 (untied), bart."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    common = {"vocab_size": 300, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0}
    llama = {**SIZES, **common, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    settings: dict[str, dict[str, Any]] = {
        "llama": llama,
        "qwen2": {**llama, "tie_word_embeddings": True},
        "gpt2": {**common, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "bert": {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64},
        "t5": {
            **common, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 1,
        },
        "bart": {
            **common, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        },
    }  # fmt: skip
    auto = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}
    made = auto.get(kind, AutoModelForCausalLM).from_config(AutoConfig.for_model(kind, **settings[kind]))
    if kind == "t5":
        made.lm_head.weight = torch.nn.Parameter(torch.randn(300, 32))
    return made.float().eval()


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of one merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", "<pad>", *letters, "th"])}
    made = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def save(folder: Path, kind: str = "llama", **options: Any) -> Path:
    """The model as a transformers folder with a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    model(kind).save_pretrained(folder, **options)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def damaged(change: Callable[[Path], None], kind: str = "llama", **options: Any) -> Callable[[Path], Path]:
    """A case that saves a model and then damages its folder."""

    def make(folder: Path) -> Path:
        change(save(folder, kind, **options))
        return folder

    return make


def tensors(change: Callable[[Tensors], Tensors | None], kind: str = "llama") -> Callable[[Path], Path]:
    """A case that damages the tensors in a safetensors file."""

    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(folder / WEIGHTS)
        changed = change(held)
        save_file(held if changed is None else changed, folder / WEIGHTS, metadata={"format": "pt"})

    return damaged(rewrite, kind)


def config(kind: str = "llama", **values: Any) -> Callable[[Path], Path]:
    """A case with other values in config.json; None takes a key away."""

    def rewrite(folder: Path) -> None:
        file = folder / "config.json"
        data = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return damaged(rewrite, kind)


def renamed(old: str, new: str, kind: str = "llama") -> Callable[[Path], Path]:
    """A case in which names that start with `old` start with `new`."""
    return tensors(
        lambda held: {(new + n.removeprefix(old) if n.startswith(old) else n): t for n, t in held.items()}, kind
    )


def without(*names: str, kind: str = "llama") -> Callable[[Path], Path]:
    """A case without some tensors."""
    return tensors(lambda held: {name: t for name, t in held.items() if not name.startswith(names)}, kind)


def cut(name: str, share: float = 0.7, kind: str = "llama", **options: Any) -> Callable[[Path], Path]:
    """A case with a file cut short."""

    def shorten(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damaged(shorten, kind, **options)


def file(name: str, content: str | bytes, kind: str = "llama", **options: Any) -> Callable[[Path], Path]:
    """A case with other contents in a file."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damaged(write, kind, **options)


def file_with(change: Callable[[str], str], name: str = "config.json") -> Callable[[Path], Path]:
    """A case with a file's text changed."""

    def rewrite(folder: Path) -> None:
        before = (folder / name).read_text()
        (folder / name).write_text(change(before))
        assert (folder / name).read_text() != before

    return damaged(rewrite)


def sharded(change: Callable[[Path, dict[str, Any]], None]) -> Callable[[Path], Path]:
    """A case in shards; the change gets the folder and the index, which is written back."""

    def rewrite(folder: Path) -> None:
        index = folder / f"{WEIGHTS}.index.json"
        data = json.loads(index.read_text())
        change(folder, data)
        index.write_text(json.dumps(data))

    return damaged(rewrite, max_shard_size="40KB")


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 1
    return found


def pickled(change: Callable[[Tensors], Any] | None = None, raw: bytes | None = None) -> Callable[[Path], Path]:
    """A case with a PyTorch file: other contents, or other bytes."""

    def rewrite(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        held = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        target = folder / "pytorch_model.bin"
        torch.save(change(held) if change else held, target)
        if raw is not None:
            target.write_bytes(raw or target.read_bytes()[: target.stat().st_size // 2])

    return damaged(rewrite)


def bin_shards(change: Callable[[list[Path], dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """A case with three PyTorch files and an index; the change gets the files and the index, which is then written."""

    def rewrite(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        held = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        files = [folder / f"pytorch_model-{number:05d}-of-00003.bin" for number in (1, 2, 3)]
        index: dict[str, Any] = {"weight_map": {}}
        for number, path in enumerate(files):
            part = dict(list(held.items())[number::3])
            torch.save(part, path)
            index["weight_map"] |= dict.fromkeys(part, path.name)
        change(files, index)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    return damaged(rewrite)


def gguf(change: Callable[[Path], Any] | None = None, **options: Any) -> Callable[[Path], Path]:
    """A case with a GGUF file; `options` of `tests.support.gguf_models.write_gguf`."""

    def make(folder: Path) -> Path:
        from tests.support.gguf_models import write_gguf

        path = write_gguf(model("llama"), folder / "tiny.gguf", **{"tokenizer": tokenizer(), **options})
        if change is not None:
            change(path)
        return path

    return make


def split(*written: int, count: int = 3) -> Callable[[Path], Path]:
    """A case with some parts of a split GGUF file; the first of them is given."""

    def make(folder: Path) -> Path:
        from tests.support.gguf_models import write_gguf

        for number in written:
            name = f"tiny-{number + 1:05d}-of-{count:05d}.gguf"
            part = (number, count)
            write_gguf(model("llama"), folder / name, tokenizer=tokenizer(), part=part)
        return folder / f"tiny-{written[0] + 1:05d}-of-{count:05d}.gguf"

    return make


class Hostile:
    """Code that unpickling would run."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def _shorter(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def _unknown_type(path: Path) -> None:
    data = bytearray(path.read_bytes())
    name = b"output_norm.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 8
    data[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(data)


def _big_endian(folder: Path) -> Path:
    import gguf as package

    return gguf(endianess=package.GGUFEndian.BIG)(folder)


def _scaled(held: Tensors, name: str, value: float) -> None:
    held[name][0, 0] = value


def _wrong_shape(held: Tensors) -> None:
    held["model.norm.weight"] = held["model.norm.weight"][:-1].clone()


def _drop_from_index(folder: Path, index: dict[str, Any]) -> None:
    index["weight_map"]["model.layers.7.mlp.down_proj.weight"] = next(iter(index["weight_map"].values()))


def _outside(folder: Path, index: dict[str, Any]) -> None:
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"


def _twice(folder: Path, index: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    first, second = shards(folder)[:2]
    save_file({**load_file(second), **dict([next(iter(load_file(first).items()))])}, second)


def _adapter(held: Tensors) -> None:
    import torch

    held["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(4, 32)


def _inner(held: Tensors) -> Tensors:
    return {name.replace("layers.", "layers._orig_mod.") if "layers" in name else name: t for name, t in held.items()}


def _integers(held: Tensors) -> None:
    import torch

    name = "model.layers.0.mlp.up_proj.weight"
    held[name] = (held[name] * 100).to(torch.int8)


def _integer_head(held: Tensors) -> None:
    import torch

    name = "cls.predictions.transform.dense.weight"
    held[name] = (held[name] * 100).to(torch.int8)


def _zeros(held: Tensors) -> None:
    held["model.layers.1.mlp.up_proj.weight"].zero_()


def _children(folder: Path) -> Path:
    save(folder / "checkpoint-500")
    save(folder / "checkpoint-1000")
    return folder


def _rope_factors() -> dict[str, Any]:
    import numpy as np

    return {"rope_freqs.weight": np.array([1, 2, 3, 8], np.float32)}


def _twice_pickled(files: list[Path], index: dict[str, Any]) -> None:
    import torch

    torch.save({**torch.load(files[1]), **torch.load(files[0])}, files[1])


def _unlisted(files: list[Path], index: dict[str, Any]) -> None:
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != files[2].name}


CODE = {"auto_map": {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}, "model_type": "mine"}


_OWN = "with values of its own"


def _beside(name: str, shape: tuple[int, ...], kind: str) -> Callable[[Path], Path]:
    """A case with a tensor beside the one that the model shares, or has already."""

    def more(held: Tensors) -> Tensors:
        import torch

        torch.manual_seed(1)
        return {**held, name: torch.randn(shape)}

    return tensors(more, kind)


def _written_by(tool: str) -> Callable[[Path], None]:
    """Give a file another format, as transformers writes it for TensorFlow and Flax."""

    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": tool})

    return rewrite


def _with(name: str, values: Callable[[], Any], kind: str = "llama") -> Callable[[Path], Path]:
    """A case with a tensor that the model has no place for."""
    return tensors(lambda held: {**held, name: values()}, kind)


def _frequencies(base: float) -> Any:
    import torch

    return base ** (-torch.arange(4) / 4)


def _learned() -> Any:
    import torch

    return torch.ones(32)


def _backwards() -> Any:
    import torch

    return torch.arange(64).flip(0)[None]


CASES: dict[str, Damage] = {
    # Names
    "a tensor renamed": Damage(renamed("model.norm.", "model.final."), r"lacks 1 .*model\.norm\.weight.*holds 1"),
    "one tensor with module.": Damage(
        renamed("model.norm.", "module.model.norm."), "wrapper's name .* 1 tensors", loads=True
    ),
    "DDP": Damage(renamed("", "module."), "wrapper's name was removed from 21 tensors", loads=True),
    "torch.compile": Damage(renamed("", "_orig_mod."), "wrapper's name", loads=True),
    "DDP and torch.compile": Damage(renamed("", "module._orig_mod."), "wrapper's name", loads=True),
    "compiled layers": Damage(tensors(_inner), r"layers\._orig_mod", loads=True),
    "PEFT, merged": Damage(renamed("", "base_model.model."), "wrapper's name", loads=True),
    "model. twice": Damage(renamed("", "model."), "wrapper's name", loads=True),
    "DDP on GPT-2": Damage(renamed("", "module.", "gpt2"), "wrapper's name", loads=True),
    "a trainer's model. on GPT-2": Damage(renamed("", "model.", "gpt2"), "wrapper's name", loads=True),
    "DDP on BERT": Damage(renamed("", "module.", "bert"), "wrapper's name", loads=True),
    "DDP on T5": Damage(renamed("", "module.", "t5"), "wrapper's name", loads=True),
    "DDP on BART": Damage(renamed("", "module.", "bart"), "wrapper's name", loads=True),
    "an unknown prefix": Damage(renamed("", "mystery."), r"lacks 21 .*lm_head.*holds 21 .*mystery\."),
    "an adapter that is not merged": Damage(tensors(_adapter), r"not merged .*lora_A"),
    # What is there
    "a tensor deleted": Damage(without("model.layers.1.mlp.up_proj"), r"lacks 1 .*layers\.1\.mlp\.up_proj\.weight"),
    "an untied head deleted": Damage(without("lm_head"), r"lacks 1 .*lm_head\.weight.*language-model head"),
    "the embedding of tied weights deleted": Damage(
        without("model.embed_tokens", kind="qwen2"), r"lacks .*embed_tokens|lacks .*lm_head"
    ),
    "a layer of GPT-2 deleted": Damage(without("transformer.h.1.", kind="gpt2"), "says 2 layers, its weights have 1"),
    "an encoder's tensor deleted": Damage(
        without("bert.encoder.layer.1.output.dense.weight", kind="bert"), r"lacks 1 .*layer\.1\.output\.dense\.weight"
    ),
    "half of an encoder's head deleted": Damage(
        without("cls.predictions.transform.dense", kind="bert"), r"lacks 2 .*cls\.predictions\.transform"
    ),
    "an encoder's head deleted": Damage(without("cls.", kind="bert"), "has no head for it", loads=True),
    "T5's untied head deleted": Damage(without("lm_head", kind="t5"), r"lacks 1 .*lm_head\.weight"),
    "T5's embedding deleted, its head untied": Damage(without("shared", kind="t5"), r"lacks 1 .*shared\.weight"),
    "T5's decoder deleted": Damage(without("decoder.block.0.layer.1", kind="t5"), r"lacks 5 .*decoder\.block\.0"),
    "BART's bias deleted": Damage(without("final_logits_bias", kind="bart"), "has no final_logits_bias", loads=True),
    "BART's shared embedding deleted": Damage(
        without("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head", kind="bart"),
        r"lacks .*(embed_tokens|shared|lm_head)",
    ),
    "a tensor too many": Damage(
        tensors(lambda held: {**held, "model.layers.0.mlp.extra.weight": held["model.norm.weight"].clone()}),
        r"holds 1 .*mlp\.extra",
    ),
    "a decoder's tensor too many, T5": Damage(
        tensors(lambda held: {**held, "decoder.block.0.layer.0.adapter.weight": held["shared.weight"].clone()}, "t5"),
        r"holds 1 .*layer\.0\.adapter",
    ),
    "a bias of the head too many": Damage(
        tensors(lambda held: {**held, "lm_head.bias": held["model.norm.weight"].clone()}), r"holds 1 .*lm_head\.bias"
    ),
    # The config of another model
    "more layers in the config": Damage(config(num_hidden_layers=3), "says 3 layers, its weights have 2"),
    "fewer layers in the config": Damage(config(num_hidden_layers=1), "says 1 layers, its weights have 2"),
    "a million layers": Damage(config(num_hidden_layers=1_000_000), "says 1000000 layers"),
    "more layers, encoder": Damage(config("bert", num_hidden_layers=4), "says 4 layers, its weights have 2"),
    "more layers, T5's decoder": Damage(config("t5", num_decoder_layers=3), "says 3 layers, its weights have 2"),
    "another width": Damage(config(intermediate_size=64), r"other shapes .*\[48, 32\].*\[64, 32\]"),
    "another vocabulary": Damage(config(vocab_size=301), r"other shapes .*\[300, 32\].*\[301, 32\]"),
    "a decoder of an encoder's family": Damage(config("bert", is_decoder=True), "says is_decoder"),
    "heads that do not divide": Damage(config(num_attention_heads=5, head_dim=None), "not a multiple of the number"),
    "no model type": Damage(config(model_type=None, architectures=None), "names no model_type"),
    "a config cut short": Damage(cut("config.json", 0.5), r"cannot read .*config\.json"),
    "a config that is a list": Damage(file("config.json", "[]"), "a JSON object is needed"),
    "GPTQ": Damage(config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised already .gptq"),
    "AWQ": Damage(config(quantization_config={"quant_method": "awq"}), "quantised already .awq"),
    "two values of one key": Damage(
        file_with(lambda text: text.replace("{", '{"rms_norm_eps": 0.1,', 1)), "two things of 'rms_norm_eps'"
    ),
    "two values in generation_config": Damage(
        file("generation_config.json", '{"eos_token_id": 0, "eos_token_id": 2}'), "two things of 'eos_token_id'"
    ),
    "an adapter beside the base": Damage(file("adapter_config.json", '{"peft_type": "LORA"}'), "would apply it: merge"),
    "code of its own": Damage(config(**CODE), "runs no code"),
    "code beside a known type": Damage(
        config(**{**CODE, "model_type": "llama"}), "brings code of its own .*transformers' own 'llama'", loads=True
    ),
    # safetensors
    "a wrong shape": Damage(tensors(_wrong_shape), r"other shapes .*model\.norm\.weight is \[31\]"),
    "integers without scales": Damage(tensors(_integers), "stored as I8"),
    "integers in a head, encoder": Damage(tensors(_integer_head, "bert"), "transform.dense.weight .* stored as I8"),
    "a masked head of its own": Damage(_beside("cls.predictions.decoder.weight", (300, 32), "bert"), _OWN),
    "two biases of a masked head": Damage(_beside("cls.predictions.decoder.bias", (300,), "bert"), _OWN),
    "two heads of a decoder": Damage(_beside("model.lm_head.weight", (300, 32), "llama"), _OWN),
    "two shared embeddings": Damage(_beside("shared.weight", (300, 32), "bart"), _OWN),
    "an embedding of the encoder's own": Damage(
        _beside("encoder.embed_tokens.weight", (300, 32), "t5"), "an embedding of the encoder's own|" + _OWN
    ),
    "a bias of logits that no decoder has": Damage(_beside("final_logits_bias", (1, 300), "llama"), _OWN),
    "of TensorFlow": Damage(damaged(_written_by("tf")), "is of TensorFlow .*the other way around"),
    "of Flax": Damage(damaged(_written_by("flax"), "bert"), "is of Flax .*the other way around"),
    "NaN": Damage(tensors(lambda h: _scaled(h, "model.layers.0.mlp.up_proj.weight", float("nan"))), "NaN or infinity"),
    "NaN in BART's bias": Damage(
        tensors(lambda h: _scaled(h, "final_logits_bias", float("nan")), "bart"), "final_logits_bias.* holds NaN"
    ),
    "a config that makes NaN": Damage(
        config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "makes .*inv_freq"
    ),
    "NaN in the config": Damage(config(rms_norm_eps=float("nan")), "says that rms_norm_eps is NaN"),
    "infinity": Damage(tensors(lambda h: _scaled(h, "model.embed_tokens.weight", float("inf"))), "NaN or infinity"),
    "a matrix of zeros": Damage(tensors(_zeros), "1 matrices .* are all zero", loads=True),
    "safetensors cut short": Damage(cut(WEIGHTS), "is cut short or no safetensors file"),
    "safetensors cut in the header": Damage(cut(WEIGHTS, 0.01), "is cut short or no safetensors file"),
    "safetensors empty": Damage(file(WEIGHTS, ""), "is empty"),
    "safetensors a pointer": Damage(file(WEIGHTS, POINTER), "Git LFS pointer"),
    "safetensors another thing": Damage(file(WEIGHTS, "<html>not found</html>" * 10), "no safetensors file"),
    "no weights": Damage(damaged(lambda folder: (folder / WEIGHTS).unlink()), "has no weights"),
    # What a model computes, and a file may hold
    "rotary frequencies of another config": Damage(
        _with("model.layers.1.self_attn.rotary_emb.inv_freq", lambda: _frequencies(1e6)), "computes from its config"
    ),
    "a learned bias of attention": Damage(_with("model.layers.0.self_attn.bias", _learned), "computes from its config"),
    "a learned bias of attention, encoder": Damage(
        _with("bert.encoder.layer.0.attention.bias", _learned, "bert"), "computes from its config"
    ),
    "positions in another order, encoder": Damage(
        _with("bert.embeddings.position_ids", _backwards, "bert"), "computes from its config"
    ),
    # Shards
    "a shard missing": Damage(sharded(lambda f, i: shards(f)[1].unlink()), r"1 of \d shards .*model-00002"),
    "a shard cut short": Damage(sharded(lambda f, i: _shorter(shards(f)[1])), "model-00002.* is cut short"),
    "a shard a pointer": Damage(sharded(lambda f, i: shards(f)[0].write_text(POINTER) and None), "Git LFS pointer"),
    "a tensor that no shard has": Damage(sharded(_drop_from_index), r"names 1 tensors .*layers\.7"),
    "a shard elsewhere": Damage(sharded(_outside), "no file beside it"),
    "a tensor in two shards": Damage(sharded(_twice), "which another shard has too"),
    "an index without a map": Damage(sharded(lambda f, i: i.clear()), "has no weight_map"),
    "an index cut short": Damage(cut(f"{WEIGHTS}.index.json", 0.5, max_shard_size="40KB"), "cannot read"),
    # PyTorch files
    ".bin cut short": Damage(pickled(raw=b""), "is cut short or no PyTorch file"),
    ".bin a pointer": Damage(pickled(raw=POINTER.encode()), "Git LFS pointer"),
    ".bin another thing": Damage(pickled(raw=b"\x80\x02nothing here"), "no PyTorch file"),
    ".bin with code": Damage(pickled(lambda held: {**held, "x": Hostile()}), "runs no code from a file"),
    ".bin with a number": Damage(pickled(lambda held: {**held, "epoch": 3}), "holds int under 'epoch'"),
    ".bin a list": Damage(pickled(lambda held: list(held.values())), "holds list"),
    ".bin with DDP": Damage(pickled(lambda h: {f"module.{n}": t for n, t in h.items()}), "wrapper's name", loads=True),
    ".bin with a tensor missing": Damage(
        pickled(lambda h: {n: t for n, t in h.items() if n != "model.norm.weight"}), r"lacks 1 .*model\.norm"
    ),
    # Tokenizers and folders
    ".bin in shards, one missing": Damage(
        bin_shards(lambda files, index: files[1].unlink()), r"1 of 3 shards .*pytorch_model-00002"
    ),
    ".bin in shards, one cut short": Damage(
        bin_shards(lambda files, index: _shorter(files[1])), r"00002.* is cut short or no PyTorch file"
    ),
    ".bin in shards, one a pointer": Damage(
        bin_shards(lambda files, index: files[1].write_text(POINTER)), "Git LFS pointer"
    ),
    ".bin in shards, one not in the index": Damage(bin_shards(_unlisted), "lacks 7 tensors"),
    ".bin in shards, a tensor that none has": Damage(
        bin_shards(lambda files, index: index["weight_map"].update(more=files[0].name)), "names 1 tensors .*more"
    ),
    ".bin in shards, a tensor in two": Damage(bin_shards(_twice_pickled), "which another shard has too"),
    ".bin in shards, one elsewhere": Damage(
        bin_shards(lambda files, index: index["weight_map"].update(more="/etc/passwd")), "no file beside it"
    ),
    "tokenizer.json cut short": Damage(cut("tokenizer.json", 0.5), "cannot load the tokenizer"),
    "tokenizer.json unknown": Damage(file("tokenizer.json", '{"version": "9.9"}'), "cannot load the tokenizer"),
    "tokenizer.json a pointer": Damage(file("tokenizer.json", POINTER), "Git LFS pointer"),
    "a folder of checkpoints": Damage(_children, "checkpoint-1000, checkpoint-500"),
    # GGUF
    "GGUF, one part of three": Damage(split(0), r"one of 3 parts .*00002-of-00003.*00003-of-00003"),
    "GGUF, the last part alone": Damage(split(2), r"one of 3 parts .*00001-of-00003"),
    "GGUF cut short": Damage(gguf(_shorter), "cut short|its tensors end at"),
    "GGUF empty": Damage(gguf(lambda path: path.write_bytes(b"")), "is empty"),
    "GGUF a pointer": Damage(gguf(lambda path: path.write_text(POINTER)), "Git LFS pointer"),
    "GGUF another thing": Damage(gguf(lambda path: path.write_bytes(b"GGML" + bytes(100))), "is no GGUF file"),
    "GGUF big-endian": Damage(_big_endian, "other byte order"),
    "GGUF of an unknown type": Damage(gguf(_unknown_type), "kind that gguf does not know"),
    "GGUF without a tensor": Damage(gguf(skip=("blk.1.ffn_up.weight",)), r"lacks 1 .*layers\.1\.mlp\.up_proj"),
    "GGUF without a layer": Damage(gguf(fields={"block_count": 3}), "says 3 layers, its weights have 2"),
    "GGUF of too many layers": Damage(gguf(fields={"block_count": 1}), "says 1 layers, its weights have 2"),
    "GGUF with a tensor too many": Damage(
        gguf(extra={"blk.0.attn_sinks.weight": _rope_factors()["rope_freqs.weight"]}), "blk.0.attn_sinks"
    ),
    "GGUF with NaN for a number": Damage(
        gguf(fields={"attention.layer_norm_rms_epsilon": float("nan")}), "says that rms_norm_eps is NaN"
    ),
    "GGUF without a tokenizer": Damage(gguf(tokenizer=None), "has no tokenizer that can be read"),
    "GGUF that cuts text by an unknown rule": Damage(gguf(pre="deepseek-llm"), "pre is 'deepseek-llm', by whose rules"),
    "GGUF that names no rule of cutting text": Damage(gguf(pre=None), "pre is None, by whose rules"),
    "GGUF with other rotary factors": Damage(gguf(extra=_rope_factors()), "rope_freqs"),
    "GGUF with a scale of attention": Damage(gguf(fields={"attention.scale": 0.1}), r"attention\.scale = 0\.1"),
    "GGUF with capped logits": Damage(gguf(fields={"final_logit_softcapping": 3.0}), "final_logit_softcapping = 3"),
    "GGUF with a sliding window": Damage(gguf(fields={"attention.sliding_window": 8}), "sliding_window = 8"),
    "GGUF that attends both ways": Damage(gguf(fields={"attention.causal": 0}), "attention.causal = 0"),
    "GGUF with experts": Damage(gguf(fields={"expert_count": 8}), "expert_count = 8"),
    "GGUF with part of the heads rotated": Damage(gguf(fields={"rope.dimension_count": 4}), "other shapes|dimension"),
    "GGUF with scaled yarn": Damage(
        gguf(fields={
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_attn_factor": 2.0,
        }),
        r"yarn_attn_factor = 2\.0",
    ),
    "GGUF with an unknown rope scaling": Damage(
        gguf(fields={"rope.scaling.type": "dynamic", "rope.scaling.factor": 4.0}), "scales rotary positions .dynamic"
    ),
}  # fmt: skip
