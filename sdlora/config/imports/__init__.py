"""Configurations of other trainers, translated into ours: one table of keys and rules per form."""
