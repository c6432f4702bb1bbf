"""Sentence-transformers directories: a transformers model with pooling and projections, as one module."""
