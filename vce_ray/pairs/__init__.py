"""From a concept to a set of image pairs: prompts, captions without the concept, pairs."""
