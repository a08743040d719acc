"""Base models: one file per family behind one Protocol. Floor 3."""
