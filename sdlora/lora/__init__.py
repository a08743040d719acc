"""Low-rank adapters: layers, which modules get one, injection."""
