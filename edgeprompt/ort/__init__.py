"""ONNX Runtime: sessions, the packed-graph cache, KV caches, prefixes in memory and on disk."""
