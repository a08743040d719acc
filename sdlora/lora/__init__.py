"""Low-rank adapters: layers, which modules get one, file formats, and the proof that a file loads. Floor 2."""
