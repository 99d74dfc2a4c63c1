"""LlamaGen's text-to-image models: the GPT (gpt.py), the image tokenizer (vq.py) and their loading (convert.py)."""
