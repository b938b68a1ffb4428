"""Helpers shared by test modules and the scripts in tests/scripts."""
