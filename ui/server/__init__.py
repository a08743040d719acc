"""The web server and its access control."""
