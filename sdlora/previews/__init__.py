"""Previews: prompts, sampling, the contact sheet."""
