"""Adapters on disk: packages, the local store, names of stacks, conversions."""
