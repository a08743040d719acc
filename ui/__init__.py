"""The studio: the browser app, a window on run folders."""
