"""The schema of options, and configurations as TOML files."""
