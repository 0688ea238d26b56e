"""Bytes on disk -> named tensors. Files are hostile: every count, length and offset is compared with the bytes that are there."""
