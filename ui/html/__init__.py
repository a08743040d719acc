"""HTML fragments the pages share."""
