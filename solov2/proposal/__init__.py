"""One command for data of your own: find it in a folder, and propose settings that suit it."""
