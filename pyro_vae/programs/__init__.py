"""A model and a guide as one thing that can be run."""
