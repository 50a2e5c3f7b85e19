"""Ways from a base model to an ONNX graph; each ends in the same graph contract."""
