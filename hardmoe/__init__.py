"""hardmoe: hard mixtures of experts on hashtags, from images to one shared decoder.

The package imports nothing heavy at its top: torch, ray and faiss load inside the commands that need them.
"""

__version__ = "0.1.0"
