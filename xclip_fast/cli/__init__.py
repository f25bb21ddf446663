"""Command line (under construction)."""
