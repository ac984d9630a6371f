"""Models: preprocess -> backbone -> head, and the architectures to build them from."""
