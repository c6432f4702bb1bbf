"""Trains programs: objectives (`objective`, `objectives`), the data they read, and the training loop they share."""
