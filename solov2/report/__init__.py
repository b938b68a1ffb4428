"""What a run has learned and what to fix first: figures, errors, and a page that shows them."""
