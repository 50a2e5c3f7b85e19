"""How graphs lie on disk."""

import onnx
import pytest

from edgeprompt.package.folder import open_package
from exporters import export_model


@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_stored_in_the_shape_that_is_read(tiny_llama_base, save_tiny, tmp_path, tied):
    base = tiny_llama_base
    if tied:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(base, tie_word_embeddings=True)
        base = save_tiny(AutoModelForCausalLM.from_config(config))
    package = export_model(base, tmp_path / "package", precision="int4", route="torch").path
    graph = onnx.load(package / "model.onnx", load_external_data=False).graph
    places = {
        tensor.name: sorted((entry.key, entry.value) for entry in tensor.external_data) for tensor in graph.initializer
    }
    (gather,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    readers = [name for name, place in places.items() if place == places[gather.input[0]]]
    assert len(readers) == (2 if tied else 1)
    assert not any(node.op_type == "Reshape" and node.input[0] in places for node in graph.node)
    noted = {weight["codes"] for weight in open_package(package).manifest.extra["weights"]}
    assert noted <= set(places)
    assert noted & set(readers)
