"""I-SHEEP: iterative self-alignment of a base language model, from scratch."""
