"""The one list of options and their defaults."""
