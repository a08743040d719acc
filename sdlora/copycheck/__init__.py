"""The copy check: which previews copy training images."""
