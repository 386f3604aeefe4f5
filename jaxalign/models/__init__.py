"""The transformer, and Hugging Face weights in and out."""
