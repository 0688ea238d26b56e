"""Objectives see only log-probabilities: a loss, and its derivative with respect to each of them."""
