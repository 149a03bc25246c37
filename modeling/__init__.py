"""The model: flat files that travel with every checkpoint; they need only torch, transformers, each other."""
