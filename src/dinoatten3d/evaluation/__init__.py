"""Run -> figures that a reviewer accepts."""
