"""Run -> one self-contained HTML file."""
