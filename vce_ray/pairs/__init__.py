"""From a concept to a set of image pairs: prompts, images, captions, refined captions. No Ray in here."""
