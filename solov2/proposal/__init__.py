"""Training on your own data with one command: find it in a folder, and propose settings that suit it."""
