"""Writing a model as a GGUF of another type."""
