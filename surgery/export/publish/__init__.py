"""Uploads what surgery wrote in the formats of other libraries to the Hugging Face hub, with a model card."""
