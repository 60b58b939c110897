"""Cohorts that anyone can make, with known truth."""
