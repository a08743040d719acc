"""Who may ask for what, and the web server."""
