"""The recipe: form, presets, base models, estimate."""
