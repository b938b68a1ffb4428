"""What several test modules and the scripts in tests/scripts share."""
