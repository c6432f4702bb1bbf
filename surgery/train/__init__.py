"""Training of programs: objectives (`objective`, `objectives`), the data they read and the loop that they share."""
