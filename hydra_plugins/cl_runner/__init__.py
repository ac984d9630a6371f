"""What Hydra finds by itself: it looks for launchers and sweepers in `hydra_plugins` alone."""
