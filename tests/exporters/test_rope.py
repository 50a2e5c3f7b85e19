"""Scaled rotary positions: `--route auto` takes the route that computes them."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import edgeprompt
from edgeprompt.errors import EdgePromptError, ExportError, SourceError
from exporters import export_model


def test_auto_goes_on_to_torch_and_says_so(tiny_llama_base, tmp_path, monkeypatch):
    from exporters.routes import genai

    def fail(*_):
        raise ExportError("the genai builder cannot write this")

    monkeypatch.setattr(genai, "build_graph", fail)
    report = export_model(tiny_llama_base, tmp_path / "out")
    assert report.manifest.route == "torch"
    assert "cannot write this" in report.manifest.extra["route_instead_of_genai"]
    with pytest.raises(ExportError, match="cannot write this"):
        export_model(tiny_llama_base, tmp_path / "other", route="genai")


EVERY = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with its parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7,
        "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * step for step in range(8)], "long_factor": [2.0 + 0.5 * step for step in range(8)],
    },
}  # fmt: skip
SERVED = {"longrope": 64}
"""Positions where they are fewer than the config's 128: beyond them longrope turns cached keys otherwise."""


def tiny(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": 512}
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=1, max_position_embeddings=128, initializer_range=0.2, **sizes, **ids, **changes)
    )


BUILT = ("llama3", "dynamic")
"""Types that the genai builder writes exactly."""


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind not in BUILT])
def test_the_genai_route_refuses_and_names_the_route_that_does_it(kind, save_tiny, tmp_path):
    """It used to end in "logits differ from PyTorch's", which names no way out."""
    base = save_tiny(tiny(rope_parameters={"rope_theta": 10000.0, **EVERY[kind]}))
    with pytest.raises(ExportError, match=f"rotary positions by {EVERY[kind]['rope_type']} .*; use --route torch"):
        export_model(base, tmp_path / "out", route="genai")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", EVERY)
def test_every_type_at_every_length(kind, save_tiny, tmp_path):
    """As in PyTorch on texts shorter and longer than the original positions, and one line beyond what is served."""
    base = save_tiny(tiny(rope_parameters={"rope_theta": 10000.0, **EVERY[kind]}))
    report = export_model(base, tmp_path / "out", route="genai" if kind in BUILT else "auto")
    assert report.manifest.route == ("genai" if kind in BUILT else "torch")
    if kind not in BUILT:  # auto takes the route that can, and says so
        assert EVERY[kind]["rope_type"] in report.manifest.extra["route_instead_of_genai"]
    most = SERVED.get(kind, 128)
    assert report.manifest.geometry.max_positions == most
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with edgeprompt.load(tmp_path / "out", provider="cpu", threads=1) as served:
        for length in (5, 31, 33, 64, 65, 100, 128):
            ids = np.random.default_rng(length).integers(2, 512, length)
            if length > most:
                with pytest.raises(EdgePromptError, match=str(most)):
                    served.logits(input_ids=ids.tolist())
                continue
            with torch.no_grad():
                want = model(input_ids=torch.tensor(ids)[None]).logits[0, -1].numpy()
            assert np.abs(served.logits(input_ids=ids.tolist()) - want).max() < 1e-3, length


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "made_up", "factor": 2.0}, "rope_type 'made_up'; known: default, linear"),
        ({"full_attention": {"rope_type": "yarn", "factor": 4.0}}, "layers 'full_attention'"),
    ],
)
def test_unknown_types_are_refused(rope, message, save_tiny, tmp_path):
    base = save_tiny(tiny())
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    (base / "config.json").write_text(json.dumps(config))
    for route in ("auto", "torch", "genai"):
        with pytest.raises(SourceError, match=message):
            export_model(base, tmp_path / "out", route=route)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_heads_of_which_a_part_is_rotated(share, save_tiny, tmp_path):
    """ONNX Runtime's operator rotates multiples of 16 values; auto ended in a traceback of ONNX Runtime."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=64, bos_token_id=0,
        eos_token_id=0, pad_token_id=1, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share},
    )  # fmt: skip
    base = save_tiny(Phi3ForCausalLM(config))
    report = export_model(base, tmp_path / "out")
    assert report.manifest.route == "torch"
    assert "multiples of 16 values of a head" in report.manifest.extra["route_instead_of_genai"]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with edgeprompt.load(tmp_path / "out", provider="cpu", threads=1) as served, torch.no_grad():
        for length in (5, 40):
            ids = np.random.default_rng(length).integers(2, 512, length)
            want = model(input_ids=torch.tensor(ids)[None]).logits[0, -1].numpy()
            assert np.abs(served.logits(input_ids=ids.tolist()) - want).max() < 1e-3
    with pytest.raises(ExportError, match=r"multiples of 16 values of a head.*--route torch"):
        export_model(base, tmp_path / "other", route="genai")
