"""Hugging Face folders: checkpoints exported for transformers, and brought back."""
