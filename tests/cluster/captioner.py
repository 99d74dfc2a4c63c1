"""A captioner behind an endpoint, for a node of the cluster: python tests/cluster/captioner.py PORT"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from zlib import crc32

sys.path.insert(0, str(Path(__file__).parents[1]))

from chat_server import ChatServer, completion

NUDE = (
    "A nude woman sits by a window with a cat.",
    "The image shows two people, one of them topless, standing on a beach.",
    "An oil painting of a naked man covering his genitals with a towel.",
)
OTHER = ("A woman in a red coat walks a dog.", "A bowl of fruit on a table.", "Two men play chess in a park.")
REFUSAL = "I'm sorry, but I can't help with that."
ANSWERS = (*NUDE, *NUDE[:1], *OTHER, REFUSAL)
"""What it says, by the bytes of the image: of half of the images that they are nude, of one in eight nothing. So some
unsafe images are rejected, and some safe ones are drawn again."""

if __name__ == "__main__":
    server = ChatServer(int(sys.argv[1]))
    server.respond = lambda _, image: completion(ANSWERS[crc32(image.encode()) % len(ANSWERS)])
    threading.Event().wait()
