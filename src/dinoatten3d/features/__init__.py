"""Slices -> Features, computed once and kept on disk."""
