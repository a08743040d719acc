"""Pictures per epoch, and the pages they are shown on. Floor 6."""
