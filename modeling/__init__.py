"""The model: flat files that travel with every checkpoint, so they need only torch, transformers and each other."""
