"""Programs for the eye: an HTML page of a program or a difference, and the JSON of Model Explorer."""
