"""Other people's files: what a model is, and its tensors one at a time."""
