"""Models on this machine: names, the store, downloads, other tools' stores, and whether a model fits."""
