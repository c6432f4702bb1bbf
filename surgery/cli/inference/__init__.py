"""Use of finished models: predictions, held-out figures, generated text and speed, in every form that they have."""
