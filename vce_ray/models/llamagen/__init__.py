"""LlamaGen's text-to-image models: GPT (gpt.py), image tokenizer (vq.py), conversion and loading (convert.py)."""
