"""Linear recurrences (Mamba, gated delta rule, ...) as one op each, at any length."""
