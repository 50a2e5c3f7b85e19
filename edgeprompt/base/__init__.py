"""The base model in PyTorch: what tuning and export share."""
