"""Commands off the main path: python -m tools.NAME."""
